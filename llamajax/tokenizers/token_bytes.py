"""Count the bytes of text that tokens stand for, without their text."""

from collections.abc import Iterable

import numpy as np

from llamajax.tokenizers.tokenizer import Tokenizer

_PART = "\ufffd"  # what a part of a character decodes to


def token_bytes(tokenizer: Tokenizer, tokens: Iterable[int]) -> np.ndarray:
    """Return the bytes that each token adds to a text, int64; 0 for those not among `tokens`."""
    sizes = np.zeros(tokenizer.vocab_size, np.int64)
    spelled = {i: piece for piece, i in getattr(tokenizer, "ranks", {}).items()}
    before = tokenizer.encode("a")
    known = len(tokenizer.decode(before))
    for token in tokens:
        text = tokenizer.decode([*before, token])[known:]
        sizes[token] = len(text.encode("utf-8", "replace")) - 2 * text.count(_PART)
        if _PART in text and tokenizer.kind == "huggingface":
            piece = tokenizer.piece(token)  # a letter for each byte, or the name of one byte
            sizes[token] = 1 if piece.startswith("<0x") else len(piece)
        elif _PART in text:
            sizes[token] = len(spelled.get(token, b"1"))
    return sizes
