"""Measure the documents of a split: lengths, copies, and which are unlike the rest."""

from typing import Any

import numpy as np

from llamajax.corpus.document_hashes import document_hashes, mix
from llamajax.corpus.inspection.document_reader import DocumentReader, DocumentRun
from llamajax.corpus.inspection.near_duplicates import MAX_SKETCHED, near_duplicates, sketches

_LISTED = 5
_BUCKETS = 64  # of the tokens of a document, to compare it with the next one
_FEW = 10  # pairs of documents
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
        self._vectors: list[np.ndarray] = []
        self.truncated = 0

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
            self._vectors.append(self._content(run))

    def _content(self, run: DocumentRun) -> np.ndarray:
        """Return a unit vector for each document, float16 (documents, buckets).

        A bucket holds the sum over its tokens of nll, each token's with a random sign.
        """
        each = mix(np.arange(len(self._nll)))
        weight = np.where(each >> np.uint64(63), self._nll, -self._nll)[run.tokens]
        bucket = (each % np.uint64(_BUCKETS)).astype(np.int64)[run.tokens]
        count = len(run.lengths)
        sums = np.bincount(run.owners * _BUCKETS + bucket, weight, count * _BUCKETS)
        sums = sums.reshape(count, _BUCKETS)
        return (sums / np.maximum(np.linalg.norm(sums, axis=1)[:, None], 1e-9)).astype(np.float16)

    def finish(self) -> None:
        """Join what was collected."""
        joined = map(np.concatenate, zip(*self._columns, strict=True))
        self.starts, self.lengths, self.hashes, self._sums, self._bytes, self._texts = joined

    def length_facts(self) -> dict[str, float]:
        """Return percentiles and mean of the lengths, in tokens with BOS and EOS."""
        found = np.percentile(self.lengths, list(_QUANTILES.values()), method="nearest").tolist()
        return dict(zip(_QUANTILES, found, strict=True)) | {"mean": float(self.lengths.mean())}

    def packing(self, seq_len: int) -> dict[str, float]:
        """Return what becomes of the documents in samples of `seq_len` tokens, without padding.

        unpacked_padding_share: of the tokens, with one document a row.
        """
        last_input = self.starts + self.lengths - 2  # the token after it may be a target alone
        rows = -(-self.lengths // seq_len)
        return {
            "documents_per_sample": seq_len / float(self.lengths.mean()),
            "cut_documents_share": float((self.starts // seq_len < last_input // seq_len).mean()),
            "longer_documents_share": float((self.lengths > seq_len + 1).mean()),
            "unpacked_padding_share": 1 - float(self.lengths.sum() / (rows.sum() * seq_len)),
        }

    def order(self) -> dict[str, float]:
        """Return how much successive documents are alike in content; nothing of too few.

        The correlation of a document's vector with the next one's. Of shuffled documents it is 0
        within a standard error of |C| / tr(C) / sqrt(pairs), C being the covariance of the vectors.
        """
        x = np.concatenate(self._vectors).astype(np.float32)
        ends = self.starts[: len(x)] + self.lengths[: len(x)]
        first = np.flatnonzero(ends[:-1] == self.starts[1 : len(x)])
        x -= x.mean(axis=0)
        covariance = x.T @ x / len(x)
        variance = float(np.trace(covariance))
        if len(first) < _FEW or variance < 1e-9:
            return {}
        correlation = float((x[first] * x[first + 1]).sum()) / len(first) / variance
        error = float(np.linalg.norm(covariance)) / variance / len(first) ** 0.5
        return {"correlation": correlation, "shuffled": 0, "standard_error": error}

    def copies(self, reader: DocumentReader) -> dict[str, Any]:
        """Return the documents that occur most often, and those that nearly copy an earlier one."""
        _, firsts, counts = np.unique(self.hashes, return_index=True, return_counts=True)
        sketched = np.concatenate(self._sketches)
        originals = np.sort(firsts[firsts < len(sketched)])
        near = near_duplicates(sketched[originals])
        return {
            "copies": {"near": len(near.documents), "compared": near.compared},
            "most_frequent": [
                {"times": int(counts[i]), **self._describe(reader, firsts[i])}
                for i in np.argsort(-counts, kind="stable")[:_LISTED]
                if counts[i] > 1
            ],
            "nearly_the_same": [
                {
                    "similarity": float(near.similarity[i]),
                    "earlier_at": int(self.starts[originals[near.earlier[i]]]),
                    **self._describe(reader, originals[near.documents[i]]),
                }
                for i in np.argsort(-near.similarity, kind="stable")[:_LISTED]
            ],
        }

    def unlike(self, reader: DocumentReader) -> dict[str, Any]:
        """Return how many documents are unlike the split's others, and the farthest of them.

        Distances are in robust standard deviations, of two figures: mean loss by token frequencies,
        and bytes per token. Documents of less than 64 tokens differ by chance and are left out.
        """
        long = np.flatnonzero(self._texts >= _ODD_FROM)
        loss, size = self._sums[long] / self._texts[long], self._bytes[long] / self._texts[long]
        far = np.maximum(_distances(loss), _distances(size)) if len(long) else np.empty(0)
        return {
            "unlike": {"documents": int((far >= _ODD).sum()), "compared": len(long)},
            "farthest": [
                {
                    "deviations": float(far[i]),
                    "unigram_loss": float(loss[i]),
                    "bytes_per_token": float(size[i]),
                    **self._describe(reader, long[i]),
                }
                for i in np.argsort(-far, kind="stable")[:_LISTED]
                if far[i] >= _ODD
            ],
        }

    def _describe(self, reader: DocumentReader, number: int) -> dict[str, Any]:
        """Return where a document is, its length, and how it begins."""
        start, length = int(self.starts[number]), int(self.lengths[number])
        return {"at_token": start, "length": length, "text": reader.text(start, start + length)}


def _distances(x: np.ndarray) -> np.ndarray:
    """Return distances from the median in standard deviations, estimated by their median."""
    middle = np.median(x)
    spread = 1.4826 * np.median(np.abs(x - middle))
    return np.abs(x - middle) / max(spread, _LEAST_SPREAD * middle, 1e-9)
