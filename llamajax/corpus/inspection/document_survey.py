"""Measure the documents of a split: lengths, copies, and which are unlike the rest."""

from typing import Any

import numpy as np

from llamajax.corpus.document_hashes import document_hashes
from llamajax.corpus.inspection.document_reader import DocumentReader, DocumentRun
from llamajax.corpus.inspection.near_duplicates import MAX_SKETCHED, near_duplicates, sketches
from llamajax.corpus.inspection.neighbor_order import NeighborOrder

_LISTED = 5
_QUANTILES = {"min": 0, "p1": 1, "p10": 10, "median": 50, "p90": 90, "p99": 99, "max": 100}
_ODD_FROM = 64  # tokens of text; shorter documents differ by chance
_ODD = 6.0  # robust standard deviations
_LEAST_SPREAD = 0.02  # of the median: one standard deviation is at least that


class Survey:
    """What is collected of the documents of a split, an entry for each.

    nll: of each token of the vocabulary, by its share in the split, nats; 0 of what is no text.
    """

    def __init__(self, nll: np.ndarray, token_bytes: np.ndarray, shingle: int) -> None:
        self._nll, self._token_bytes, self._shingle = nll, token_bytes, shingle
        self._columns: list[tuple[np.ndarray, ...]] = []
        self._sketches: list[np.ndarray] = []
        self.truncated = 0
        self.order = NeighborOrder(nll)

    def add(self, run: DocumentRun) -> None:
        """Collect the documents of a run."""
        self.truncated += int((run.lengths < run.full_lengths).sum())
        tokens, count, owners = run.tokens, len(run.lengths), run.owners
        size = self._token_bytes[tokens]
        nll = np.bincount(owners, self._nll[tokens], count)
        num_bytes, num_text = np.bincount(owners, size, count), np.bincount(owners, size > 0, count)
        hashes = document_hashes(tokens, run.lengths)
        self._columns.append((run.starts, run.full_lengths, hashes, nll, num_bytes, num_text))
        if sum(map(len, self._sketches)) < MAX_SKETCHED:
            self._sketches.append(sketches(run, self._shingle))
        self.order.add(run)

    def finish(self) -> None:
        """Join what was collected."""
        joined = map(np.concatenate, zip(*self._columns, strict=True))
        self.starts, self.lengths, self.hashes, self._sums, self._bytes, self._texts = joined

    def length_facts(self) -> dict[str, float]:
        """Return percentiles and mean of the lengths, in tokens with BOS and EOS."""
        found = np.percentile(self.lengths, list(_QUANTILES.values()), method="nearest").tolist()
        return dict(zip(_QUANTILES, found, strict=True)) | {"mean": float(self.lengths.mean())}

    def packing(self, seq_len: int) -> dict[str, float]:
        """Return what becomes of the documents in samples of `seq_len` tokens."""
        last = self.starts + self.lengths - 1
        rows = -(-self.lengths // seq_len)
        return {
            "seq_len": seq_len,
            "documents_per_sample": seq_len / float(self.lengths.mean()),
            "cut_documents": float((self.starts // seq_len != last // seq_len).mean()),
            "longer_documents": float((self.lengths > seq_len).mean()),
            "padding_unpacked": 1 - float(self.lengths.sum() / (rows.sum() * seq_len)),
        }

    def duplicates(self, reader: DocumentReader) -> dict[str, Any]:
        """Return how many documents are copies of others, or nearly, and the most frequent ones."""
        _, firsts, counts = np.unique(self.hashes, return_index=True, return_counts=True)
        top = np.argsort(-counts, kind="stable")[:_LISTED]
        originals = np.sort(firsts)
        is_copy = np.ones(len(self.hashes), bool)
        is_copy[firsts] = False
        sketched = np.concatenate(self._sketches)
        originals = originals[originals < len(sketched)]
        near = near_duplicates(sketched[originals])
        best = np.argsort(-near.similarity, kind="stable")[:_LISTED]
        return {
            "copies": int(is_copy.sum()),
            "copied_tokens": int(self.lengths[is_copy].sum()),
            "most_frequent": [
                {"count": int(counts[i]), **self.describe(reader, firsts[i])}
                for i in top
                if counts[i] > 1
            ],
            "near_copies": len(near.documents),
            "compared": len(originals),
            "nearest": [
                {
                    "similarity": float(near.similarity[i]),
                    **self.describe(reader, originals[near.documents[i]]),
                    "earlier_token": int(self.starts[originals[near.earlier[i]]]),
                }
                for i in best
            ],
        }

    def outliers(self, reader: DocumentReader) -> dict[str, Any]:
        """Return the documents whose tokens are unlike the split's, the farthest first.

        Distances are in robust standard deviations, of two figures: mean loss by token frequencies,
        and bytes per token.
        """
        long = np.flatnonzero(self._texts >= _ODD_FROM)
        figures = self._sums[long] / self._texts[long], self._bytes[long] / self._texts[long]
        if not len(long):
            return {"documents": 0, "farthest": []}
        far = np.max([np.abs(_distances(figure)) for figure in figures], axis=0)
        order = np.argsort(-far, kind="stable")[: min(_LISTED, int((far >= _ODD).sum()))]
        return {
            "documents": int((far >= _ODD).sum()),
            "unigram_loss": float(np.median(figures[0])),
            "bytes_per_token": float(np.median(figures[1])),
            "farthest": [
                {
                    "distance": float(far[i]),
                    "unigram_loss": float(figures[0][i]),
                    "bytes_per_token": float(figures[1][i]),
                    **self.describe(reader, long[i]),
                }
                for i in order
            ],
        }

    def describe(self, reader: DocumentReader, number: int) -> dict[str, Any]:
        """Return where a document is, its length, and how it begins."""
        start, length = int(self.starts[number]), int(self.lengths[number])
        return {"token": start, "length": length, "text": reader.text(start, start + length)}


def _distances(x: np.ndarray) -> np.ndarray:
    """Return distances from the median in standard deviations, estimated by the median one."""
    middle = np.median(x)
    spread = 1.4826 * np.median(np.abs(x - middle))
    return (x - middle) / max(spread, _LEAST_SPREAD * middle, 1e-9)
