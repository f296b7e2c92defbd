"""New tokens as text while they come, so that every character comes out whole."""

from collections.abc import Sequence

from llamajax.data import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what the bytes of half a character decode to


def decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of ids; those that the model has and the tokenizer has not give nothing."""
    return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])


class TextStream:
    """Text that continues a prompt's, piece by piece: what `feed` and `finish` return, joined.

    Tokens are decoded together with those before them, back to the last place where a character
    ended. So a space that a tokenizer drops at the start of a text stays, and the cost is linear.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._before, self._new = list(prompt_ids), []

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; an unfinished character waits for the rest of it."""
        self._new += ids
        text = self._text()
        if text.endswith(_BROKEN):
            return ""
        if text:
            self._before, self._new = self._new, []
        return text

    def finish(self) -> str:
        """What was held back."""
        text, self._new = self._text(), []
        return text

    def _text(self) -> str:
        before = decoded(self._tokenizer, self._before)
        return decoded(self._tokenizer, self._before + self._new)[len(before) :]


class IdStream:
    """The same for a model without a tokenizer: ids between commas."""

    def __init__(self) -> None:
        self._comma = ""

    def feed(self, ids: Sequence[int]) -> str:
        """The ids."""
        if not ids:
            return ""
        text, self._comma = self._comma + ",".join(map(str, ids)), ","
        return text

    def finish(self) -> str:
        """Nothing is ever held back."""
        return ""
