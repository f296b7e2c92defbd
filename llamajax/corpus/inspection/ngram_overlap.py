"""Find text of validation or evaluation in the training data, by n-grams of tokens."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.corpus.document_hashes import ngram_hashes
from llamajax.corpus.input_files import (
    decompressed,
    format_of,
    json_object,
    numbered_lines,
    read_text,
)
from llamajax.corpus.inspection.document_reader import DocumentRun
from llamajax.errors import UserError
from llamajax.tokenizers import Tokenizer

_LISTED, _LEAST_SHOWN = 5, 0.1  # rows, share of their n-grams
_FILTER_SLOTS = 8  # for each n-gram, so that one in eight of the others passes
_MAX_FILTER_BITS = 27


class NgramOverlap:
    """N-grams of reference texts, each of which is looked for in the training data.

    A row is a document, or a line of JSON; it has several texts where the line has several strings.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._hashes: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []  # of each hash
        self._places: list[tuple[str, str, np.ndarray]] = []  # reference, place, tokens of each row
        self._unique = self._found = np.empty(0, np.uint64)

    def add(self, reference: str, place: str, texts: Sequence[np.ndarray]) -> None:
        """Add a row of a reference: the tokens of its texts."""
        hashes = [ngram_hashes(tokens, self.n) for tokens in texts]
        self._hashes += hashes
        self._rows += [np.full(len(found), len(self._places)) for found in hashes]
        longest = max(texts, key=len, default=np.empty(0, np.uint32))
        self._places.append((reference, place, longest[:100].copy()))

    def freeze(self) -> None:
        """Get ready for `look`: no more rows are added."""
        self._all = np.concatenate([np.empty(0, np.uint64), *self._hashes])
        self._of = np.concatenate([np.empty(0, np.int64), *self._rows])
        self._hashes, self._rows = [], []
        self._unique = np.unique(self._all)
        self._found = np.full(len(self._unique), -1)  # token of the training stream
        slots = max(1, _FILTER_SLOTS * len(self._unique))
        self._shift = np.uint64(64 - min(_MAX_FILTER_BITS, slots.bit_length()))
        self._filter = np.zeros(1 << (64 - int(self._shift)), bool)
        self._filter[self._unique >> self._shift] = True

    def look(self, run: DocumentRun) -> None:
        """Look for the n-grams in documents of the training data."""
        hashes = ngram_hashes(run.tokens, self.n)
        at = np.flatnonzero(self._filter[hashes >> self._shift])
        slot = np.searchsorted(self._unique, hashes[at])
        slot = np.minimum(slot, max(0, len(self._unique) - 1))
        same = self._unique[slot] == hashes[at]
        at, slot = at[same], slot[same]
        owner = np.searchsorted(run.offsets, at, side="right") - 1
        self._found[slot] = run.starts[owner] + at - run.offsets[owner]

    def result(self, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """Return for each reference how much of it was found, and its rows with most of it."""
        found = self._found[np.searchsorted(self._unique, self._all)]
        size = len(self._places)
        total = np.bincount(self._of, minlength=size)
        seen = np.bincount(self._of[found >= 0], minlength=size)
        share = seen / np.maximum(total, 1)
        where = np.full(size, -1)
        where[self._of[found >= 0]] = found[found >= 0]
        names = np.array([reference for reference, _, _ in self._places])
        results = []
        for name in dict.fromkeys(names.tolist()):
            own = np.flatnonzero(names == name)
            worst = own[np.lexsort((-seen[own], -share[own]))][:_LISTED]
            results.append(
                {
                    "reference": name,
                    "rows": len(own),
                    "short_rows": int((total[own] == 0).sum()),
                    "ngrams": int(total[own].sum()),
                    "found_ngrams": int(seen[own].sum()),
                    "share": float(seen[own].sum() / max(1, total[own].sum())),
                    "rows_half_found": int((share[own] >= 0.5).sum()),
                    "rows_found_whole": int((share[own] == 1).sum()),
                    "worst": [
                        {
                            "place": self._places[row][1],
                            "share": float(share[row]),
                            "train_token": int(where[row]),
                            "text": tokenizer.decode(self._places[row][2].tolist()),
                        }
                        for row in worst
                        if share[row] >= _LEAST_SHOWN
                    ],
                }
            )
        return results


def reference_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the place and the texts of each row of a file: all strings of a JSON line, or one text.

    Raises UserError for a file that cannot be read, or is neither text nor JSON lines.
    """
    if format_of(file) == ".txt":
        yield str(file), [read_text(file)]
        return
    if format_of(file) != ".jsonl":
        raise UserError(f"--against={file}: name a .txt or .jsonl file (also .gz or .zst)")
    try:
        with file.open("rb") as raw:
            for number, line in numbered_lines(file, decompressed(file, raw)):
                try:
                    yield f"{file}:{number}", list(_strings(json_object(line)))
                except UserError as error:
                    raise UserError(f"--against: {file}:{number}: {error}") from error
    except OSError as error:
        raise UserError(f"--against={file}: cannot be read: {error.strerror or error}") from error


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value, without the keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
