"""Hash documents and n-grams of tokens, 64 bits each, and count copies in bounded memory."""

from collections.abc import Sequence

import numpy as np

_ODD = 0x9E3779B97F4A7C15
_MAX_KEPT = 1 << 22  # 32 MB of hashes


def mix(x: np.ndarray) -> np.ndarray:
    """Hash each number to 64 bits: the SplitMix64 generator's step and finalizer."""
    x = x.astype(np.uint64) + np.uint64(_ODD)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def document_hashes(
    tokens: np.ndarray, lengths: Sequence[int] | np.ndarray, *, before: int = 0
) -> np.ndarray:
    """Hash documents: the sum over a document of mix(position, token), so that parts add up.

    before: tokens of the first document that other calls have hashed.
    """
    ends = np.cumsum(lengths)
    starts = np.concatenate(([0], ends[:-1]))
    position = np.arange(len(tokens)) - np.repeat(starts, lengths)
    position[: lengths[0]] += before
    sums = np.cumsum(mix(tokens.astype(np.uint64) | position.astype(np.uint64) << np.uint64(32)))
    sums = np.concatenate((np.zeros(1, np.uint64), sums))
    return sums[ends] - sums[starts]


def ngram_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """Hash the n tokens from each position on, as far as there are n."""
    each, count = mix(tokens), max(0, len(tokens) - n + 1)
    found = np.zeros(count, np.uint64)
    for k in range(n):
        found += each[k : k + count] * np.uint64(pow(_ODD, k, 1 << 64))
    return found


class CopyCounter:
    """Counts documents that are copies of an earlier one.

    Exact up to 4 M documents. Of more, those are counted whose hash ends in `bits` zeros, which
    keeps all copies of a text together, and the result is scaled.
    """

    def __init__(self) -> None:
        self.bits = 0
        self._kept, self._num_kept = [np.empty(0, np.uint64)], 0
        self._last = np.empty(0, np.uint64)  # of the document that may go on
        self._last_length = 0

    def add(self, tokens: np.ndarray, lengths: Sequence[int], *, continues: bool = False) -> None:
        """Count documents. continues: the first is the rest, or a part, of the one before."""
        found = document_hashes(tokens, lengths, before=self._last_length * continues)
        if continues:
            found[:1] += self._last
        else:
            self._keep(self._last)
        self._keep(found[:-1])
        self._last_length = lengths[-1] + self._last_length * (continues and len(lengths) == 1)
        self._last = found[-1:]

    def _keep(self, hashes: np.ndarray) -> None:
        self._kept.append(self._of_share(hashes))
        self._num_kept += len(self._kept[-1])
        while self._num_kept > _MAX_KEPT:
            self.bits += 1
            self._kept = [self._of_share(np.concatenate(self._kept))]
            self._num_kept = len(self._kept[0])

    def _of_share(self, hashes: np.ndarray) -> np.ndarray:
        return hashes[hashes & np.uint64((1 << self.bits) - 1) == 0]

    def copies(self) -> int:
        """Return the number of copies, an estimate if `bits` is not 0. To be called once."""
        self._keep(self._last)
        return (self._num_kept - len(np.unique(np.concatenate(self._kept)))) << self.bits
