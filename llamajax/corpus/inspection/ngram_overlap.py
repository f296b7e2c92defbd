"""Find text of validation or evaluation in the training data, by n-grams of tokens."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.corpus.document_hashes import ngram_hashes
from llamajax.corpus.input_files import decompressed, format_of, read_text
from llamajax.corpus.inspection.document_reader import DocumentRun
from llamajax.corpus.json_values import json_values
from llamajax.errors import UserError
from llamajax.tokenizers import Tokenizer

_PIECE = 1 << 19  # characters that are encoded at a time
_LISTED, _LEAST_SHOWN, _SHOWN_TOKENS = 5, 0.1, 60  # rows, share of their n-grams, tokens
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
        self._left_out: dict[str, int] = {}  # rows of each reference
        self._all = self._unique = np.empty(0, np.uint64)
        self._found = np.empty(0, np.int64)

    def add_files(self, files: Sequence[str], tokenizer: Tokenizer, max_tokens: int) -> None:
        """Add texts: a whole file, or a row for each JSON line. Raises UserError.

        About the first max_tokens of all files are added, in pieces of a text.
        """
        for name in files:
            self._left_out[name] = 0
            for place, texts in _rows_of(Path(name)):
                pieces = [t[i : i + _PIECE] for t in texts for i in range(0, len(t), _PIECE)]
                added: list[np.ndarray] = []
                while len(added) < len(pieces) and max_tokens > 0:
                    added.append(tokenizer.encode_array(pieces[len(added)]))
                    max_tokens -= len(added[-1])
                self._left_out[name] += len(added) < len(pieces)
                if len(added) or not pieces:
                    self._add(name, place, added)

    def add_documents(self, reference: str, runs: Iterable[DocumentRun], total: int) -> None:
        """Add a row for each prepared document. total: with those that `runs` leaves out."""
        self._left_out[reference] = total
        for run in runs:
            self._left_out[reference] -= len(run.lengths)
            documents = np.split(run.tokens, run.offsets[1:])
            for start, tokens in zip(run.starts.tolist(), documents, strict=True):
                self._add(reference, f"{reference} token {start}", [tokens])

    def _add(self, reference: str, place: str, texts: Sequence[np.ndarray]) -> None:
        hashes = [ngram_hashes(tokens, self.n) for tokens in texts]
        self._hashes += hashes
        self._rows += [np.full(len(found), len(self._places)) for found in hashes]
        longest = max(texts, key=len, default=np.empty(0, np.uint32))
        self._places.append((reference, place, longest[:_SHOWN_TOKENS].copy()))

    def _freeze(self) -> None:
        self._all = np.concatenate([np.empty(0, np.uint64), *self._hashes])
        self._unique = np.unique(self._all)
        self._found = np.full(len(self._unique), -1)  # token of the training stream
        bits = min(_MAX_FILTER_BITS, (_FILTER_SLOTS * len(self._unique)).bit_length())
        self._shift, self._filter = np.uint64(64 - bits), np.zeros(1 << bits, bool)
        self._filter[self._unique >> self._shift] = True
        self._hashes = []

    def look(self, run: DocumentRun) -> None:
        """Look for the n-grams in documents of the training data; no row is added from then on."""
        if self._hashes:
            self._freeze()
        if not len(self._unique):
            return
        hashes = ngram_hashes(run.tokens, self.n)
        at = np.flatnonzero(self._filter[hashes >> self._shift])
        slot = np.minimum(np.searchsorted(self._unique, hashes[at]), len(self._unique) - 1)
        same = self._unique[slot] == hashes[at]
        at, slot = at[same], slot[same]
        owner = np.searchsorted(run.offsets, at, side="right") - 1
        self._found[slot] = run.starts[owner] + at - run.offsets[owner]

    def result(self, tokenizer: Tokenizer) -> dict[str, list[dict[str, Any]]]:
        """Return how much of each reference was found, and the rows with most of it."""
        found = self._found[np.searchsorted(self._unique, self._all)]
        size, of = len(self._places), np.concatenate([np.empty(0, np.int64), *self._rows])
        total = np.bincount(of, minlength=size)
        seen = np.bincount(of[found >= 0], minlength=size)
        share = seen / np.maximum(total, 1)
        where = np.full(size, -1)
        where[of[found >= 0]] = found[found >= 0]
        names = np.array([reference for reference, _, _ in self._places])
        overlap, worst = [], []
        for name in self._left_out:
            own = np.flatnonzero(names == name)
            order = own[np.lexsort((-seen[own], -share[own]))]
            worst += [row for row in order[:_LISTED] if share[row] >= _LEAST_SHOWN]
            overlap.append(
                {
                    "text": name,
                    "rows": len(own),
                    "rows_left_out": self._left_out[name],
                    "too_short": int((total[own] == 0).sum()),
                    "found_share": float(seen[own].sum() / max(1, total[own].sum())),
                    "rows_half_found": int((share[own] >= 0.5).sum()),
                    "rows_found_whole": int((share[own] == 1).sum()),
                }
            )
        return {
            "overlap": overlap,
            "overlapping_rows": [
                {
                    "row": self._places[row][1],
                    "found_share": float(share[row]),
                    "at_train_token": int(where[row]),
                    "text": tokenizer.decode(self._places[row][2].tolist()),
                }
                for row in worst
            ],
        }


def _rows_of(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the place and the texts of each row of a file: all strings of a JSON row, or one text.

    Raises UserError for a file that cannot be read, or is neither text nor JSON.
    """
    if format_of(file) not in (".txt", ".jsonl"):
        raise UserError(f"--against={file}: name a .txt or .jsonl file (also .gz or .zst)")
    try:
        if format_of(file) == ".txt":
            yield str(file), [read_text(file)]
            return
        with file.open("rb") as raw:
            for place, value in json_values(file, decompressed(file, raw)):
                if isinstance(value, UserError):
                    raise value
                yield place, list(_strings(value))
    except OSError as error:
        raise UserError(f"--against={file}: cannot be read: {error.strerror or error}") from error
    except UserError as error:
        raise UserError(f"--against={error}") from error


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value, without the keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
