"""Tell whether documents are shuffled: how much each resembles the next one."""

from typing import Any

import numpy as np

from llamajax.corpus.document_hashes import mix
from llamajax.corpus.inspection.document_reader import DocumentRun

_BUCKETS = 64


class Neighbors:
    """Correlation of each document's vector with that of the next one.

    Of a shuffled set it is 0 within a standard error of |S| / tr(S) / sqrt(pairs), S being the
    covariance of the vectors.
    """

    def __init__(self, size: int) -> None:
        self._sum, self._square = np.zeros(size), np.zeros((size, size))
        self._product, self._count, self._pairs = 0.0, 0, 0
        self._first_sum, self._second_sum = np.zeros(size), np.zeros(size)  # of the pairs
        self._last = np.zeros((0, size))

    def add(self, vectors: np.ndarray, *, follows: bool) -> None:
        """Add the vectors (documents, size) of successive documents."""
        self._sum += vectors.sum(axis=0)
        self._square += vectors.T @ vectors
        self._count += len(vectors)
        row = np.concatenate((self._last, vectors)) if follows else vectors
        self._product += float((row[1:] * row[:-1]).sum())
        self._first_sum += row[:-1].sum(axis=0)
        self._second_sum += row[1:].sum(axis=0)
        self._pairs += len(row) - 1
        self._last = vectors[-1:]

    def result(self) -> dict[str, float] | None:
        """Return the correlation and its standard error; None where there are too few documents."""
        if self._pairs < 10:
            return None
        mean = self._sum / self._count
        covariance = self._square / self._count - np.outer(mean, mean)
        variance = float(np.trace(covariance))
        if variance <= 1e-9:
            return None
        means = float(self._first_sum @ self._second_sum) / self._pairs**2
        correlation = (self._product / self._pairs - means) / variance
        error = float(np.linalg.norm(covariance)) / variance / self._pairs**0.5
        return {"correlation": correlation, "standard_error": error}


class NeighborOrder:
    """How successive documents resemble each other in content, and in the logarithm of length.

    Content is a unit vector: the sums of nll over the tokens in each of 64 buckets, each token's
    with a random sign. nll: of each token of the vocabulary, by its share in the split.
    """

    def __init__(self, nll: np.ndarray) -> None:
        each = mix(np.arange(len(nll)))
        self._bucket = (each & np.uint64(_BUCKETS - 1)).astype(np.int64)
        self._weight = np.where(each >> np.uint64(63), nll, -nll)
        self._content, self._length = Neighbors(_BUCKETS), Neighbors(1)

    def add(self, run: DocumentRun) -> None:
        """Add the documents of a run."""
        count = len(run.lengths)
        cells = run.owners * _BUCKETS + self._bucket[run.tokens]
        vectors = np.bincount(cells, self._weight[run.tokens], count * _BUCKETS)
        vectors = vectors.reshape(count, _BUCKETS)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        self._content.add(vectors, follows=run.follows)
        self._length.add(np.log(run.full_lengths)[:, None], follows=run.follows)

    def result(self) -> dict[str, Any]:
        """Return both correlations."""
        return {"content": self._content.result(), "length": self._length.result()}
