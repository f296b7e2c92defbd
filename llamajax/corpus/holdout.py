"""Choose the text that is held out for validation, by the order of the documents alone."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from llamajax.corpus.instructions import Example
from llamajax.corpus.long_text import LongText
from llamajax.errors import UserError

SPLITS = ("train", "validation")
_HELD_PER_GROUP = 10
_TOO_LITTLE = "too little text to hold any out; add some, or pass --validation_fraction=0"

# Around the cut of a long text; as far as the nearest blank line is looked for.
_MAX_REACH = 1 << 22


@dataclasses.dataclass(frozen=True)
class DocumentPart:
    """A document, or the part of a text, that goes to one split.

    begins, ends: of a piece of a text, whether it is the first and the last one.
    """

    split: str
    document: str | Example | LongText
    begins: bool = True
    ends: bool = True

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text, or of an example's answers."""
        whole = isinstance(self.document, str)
        texts = [self.document] if whole else self.document.answers
        return sum(len(text.encode("utf-8", "replace")) for text in texts)


class Holdout:
    """Divides documents into train and validation; neither split is ever empty.

    Many documents (at least 10 / fraction): of each group of that many, the 10 whose number has
    the smallest hash are held out. Fewer: whole documents in the order of their hash, as long as
    they fit into the fraction of the text. If none fits (a book, or a few): the end of the first
    one, from the start of a paragraph. Examples are never cut: the first is held out whole, if
    there is another. Where inputs declare what is held out, that is held out and nothing else.

    cut: the number of the document that is held out in part, None if there is none; cut_at: from
    about where on.
    """

    def __init__(
        self,
        sizes: Iterable[int],
        fraction: float,
        *,
        whole: bool = False,
        declared: Sequence[tuple[str, int]] = (),
    ) -> None:
        """Iterate over the `sizes` of documents, in characters, until there are many.

        whole: they are examples. declared: if not empty, the splits of successive documents, each
        with their number; then the fraction is to be 0.
        """
        self._declared = declared
        self._group = math.ceil(_HELD_PER_GROUP / fraction) if fraction else 0
        self._held: set[int] = set()
        self.cut: int | None = None
        self.cut_at = self._reach = 0  # in characters, or tokens; how far from there
        if not fraction:
            return
        sizes = list(itertools.islice(sizes, self._group))
        if len(sizes) == self._group:
            return
        self._group = 0
        left = wanted = fraction * sum(sizes)
        order = sorted(range(len(sizes)), key=_hash)
        for number in order:
            if sizes[number] <= left:
                self._held.add(number)
                left -= sizes[number]
        if not self._held and whole:
            self._held.update(order[: len(sizes) > 1])
        elif not self._held and sizes:
            if max(sizes) < 2:
                raise UserError(_TOO_LITTLE)
            self.cut = next(number for number in order if sizes[number] > 1)
            self._reach = min(max(1, round(wanted)), sizes[self.cut] - 1)
            self.cut_at = sizes[self.cut] - self._reach

    def split(self, documents: Iterable[str | Example | LongText]) -> Iterator[DocumentPart]:
        """Yield the parts of all documents, in order."""
        for number, (document, held) in enumerate(zip(documents, self.held(), strict=False)):
            if number == self.cut:
                yield from self.halves(document)
            else:
                yield DocumentPart("validation" if held else "train", document)

    def held(self) -> Iterator[bool]:
        """Yield without end, for each document in turn, whether it is held out whole."""
        for split, count in self._declared:
            yield from itertools.repeat(split == "validation", count)
        in_group: set[int] = set()
        for number in itertools.count():
            if not self._group:
                yield number in self._held
                continue
            if number % self._group == 0:
                members = range(number, number + self._group)
                in_group = set(sorted(members, key=_hash)[:_HELD_PER_GROUP])
            yield number in in_group

    def halves(self, document: str | LongText) -> list[DocumentPart]:
        """Return both parts of the document `cut`; the first is to be read before the second."""
        if isinstance(document, str):
            document = LongText(iter([document]))
        reach = min(self._reach, _MAX_REACH)
        before = max(0, self.cut_at - reach - 1)
        tail = []

        def train() -> Iterator[str]:
            yield from document.take(before)
            window = "".join(document.take(self.cut_at + reach - before))
            at = _paragraph_start(window, self.cut_at - before, reach)
            tail.append(window[at:])
            yield window[:at]

        held = LongText(itertools.chain(tail, document))
        return [DocumentPart("train", LongText(train())), DocumentPart("validation", held)]


def _hash(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest()


def _paragraph_start(text: str, wanted: int, reach: int) -> int:
    """Find where to cut a text near `wanted`: at a blank line, else a line end, else a space.

    The nearest one counts, within `reach` characters on either side.
    """
    low, high = max(1, wanted - reach), len(text) - 1
    for mark in ("\n\n", "\r\n\r\n", "\n", " "):
        found = text.rfind(mark, low, wanted), text.find(mark, wanted, high)
        ends = [at + len(mark) for at in found if at >= 0 and at + len(mark) <= high]
        at = min(ends, key=lambda end: abs(end - wanted), default=0)
        if text[:at].strip() and text[at:].strip():
            return at
    if not 0 < wanted < len(text):
        raise UserError(_TOO_LITTLE)
    return wanted
