"""Whether two tokenizers are one, although their files may be of two formats."""

from llamajax.data.tokenizers import Tokenizer

# Two tokenizers that agree on this read the same text into the same tokens.
_PROBE = (
    "The quick brown fox\n\njumps over 12,345.67 lazy dogs;  don't  \tstop! naïve Straße 東京 "
    "Привет def f(x):\n    return {'key': [x ** 2]}  # <s> </s> <|begin_of_text|> 😀\n"
)


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether both read a text into the same ids, BOS and EOS included.

    By what they do and not by their files alone: Llama's tokenizer.model and the tokenizer.json
    beside it are the same tokenizer with two fingerprints.
    """
    if one.fingerprint == other.fingerprint:
        return True
    found = [(t.bos_id, t.eos_id, t.encode(_PROBE)) for t in (one, other)]
    return found[0] == found[1]
