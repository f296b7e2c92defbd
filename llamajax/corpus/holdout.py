"""Which text is held out for validation: a function of the order of the documents alone."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized

from llamajax.corpus.instructions import Example
from llamajax.errors import UserError

_GROUP_HELD = 10


@dataclasses.dataclass(frozen=True)
class Part:
    """A document, or the part of a text that goes to one split."""

    split: str
    document: str | Example

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text, or of an example's answers."""
        whole = isinstance(self.document, str)
        texts = [self.document] if whole else self.document.answers
        return sum(len(text.encode("utf-8", "replace")) for text in texts)


class Holdout:
    """Splits documents into train and validation.

    Many documents (at least 10 / fraction): of each group of that many, the 10 whose number has
    the smallest hash. Fewer: whole documents in the order of their hash, as long as they fit into
    the fraction of the text that is asked for; where not one fits (a book, or a few), the end of
    the first of them, from a paragraph's start on. So neither split is ever empty. Examples are
    never cut: the first of them is held out whole, if there is another.
    """

    def __init__(self, documents: Iterable[Sized], fraction: float, *, whole: bool = False) -> None:
        """Walks the documents only until there are many.

        Documents may be anything with their lengths in characters; whole: they are examples'.
        """
        self._fraction = fraction
        self._group = math.ceil(_GROUP_HELD / fraction) if fraction else 0
        self._held: frozenset[int] = frozenset()
        self._cut: tuple[int, int] | None = None
        self.few = False
        if not fraction:
            return
        sizes: list[int] = []
        for document in documents:
            sizes.append(len(document))
            whole = whole or isinstance(document, Example)
            if len(sizes) == self._group:
                return
        self.few = True
        self._choose(sizes, whole=whole)

    def _choose(self, sizes: Sequence[int], *, whole: bool) -> None:
        wanted = self._fraction * sum(sizes)
        order = sorted(range(len(sizes)), key=_hash)
        held, left = set(), wanted
        for number in order:
            if sizes[number] <= left:
                held.add(number)
                left -= sizes[number]
        if not held and whole:
            held.update(order[: len(sizes) > 1])
        elif not held and sizes:
            number = next((n for n in order if sizes[n] > wanted), order[0])
            self._cut = (number, sizes[number] - max(1, round(wanted)))
        self._held = frozenset(held)

    def split(self, documents: Iterable[str | Example]) -> Iterator[Part]:
        """The parts of all documents, in order."""
        for number, (document, held) in enumerate(zip(documents, self.held(), strict=False)):
            if number == self.cut:
                yield from self.halves(document)
            else:
                yield Part("validation" if held else "train", document)

    def held(self) -> Iterator[bool]:
        """Of each document in turn, without end, whether it is held out; apart from `cut`."""
        in_group: frozenset[int] = frozenset()
        for number in itertools.count():
            if self._group and not self.few:
                if number % self._group == 0:
                    members = range(number, number + self._group)
                    in_group = frozenset(sorted(members, key=_hash)[:_GROUP_HELD])
                yield number in in_group
            else:
                yield number in self._held

    @property
    def cut(self) -> int | None:
        """Number of the document that is held out in part, if one is."""
        return None if self._cut is None else self._cut[0]

    def halves(self, document: str) -> list[Part]:
        """Both parts of the document `cut`."""
        assert self._cut is not None
        at = _paragraph_start(document, self._cut[1])
        return [Part("train", document[:at]), Part("validation", document[at:])]


def _hash(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest()


def _paragraph_start(text: str, wanted: int) -> int:
    """Where to cut a text near `wanted`: at a blank line, else a line, else a space.

    The nearest one within the last `len(text) - wanted` characters on either side counts.
    """
    reach = len(text) - wanted
    low, high = max(1, wanted - reach), len(text) - 1
    finders: list[Callable[[], int]] = [
        lambda mark=mark: _nearest(text, mark, wanted, low, high)
        for mark in ("\n\n", "\r\n\r\n", "\n", " ")
    ]
    for find in finders:
        if (at := find()) > 0 and text[:at].strip() and text[at:].strip():
            return at
    if not 0 < wanted < len(text):
        raise UserError(
            "too little text to hold any out; add some, or pass --validation_fraction=0"
        )
    return wanted


def _nearest(text: str, mark: str, wanted: int, low: int, high: int) -> int:
    """End of the occurrence of `mark` nearest to `wanted`, of those that end within low..high."""
    before, after = text.rfind(mark, low, wanted), text.find(mark, wanted, high)
    ends = [at + len(mark) for at in (before, after) if at >= 0]
    return min((e for e in ends if low <= e <= high), key=lambda e: abs(e - wanted), default=-1)
