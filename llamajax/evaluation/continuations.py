"""Tokens to score with the context before them, as rows of batches; sums of their scores."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llamajax.evaluation.scoring import Score

# Rows of packed continuations are at least this long where the context allows it.
_LEAST_SEQ_LEN = 1024
_MULTIPLE = 128  # of the lengths that attention kernels take


class Continuation(NamedTuple):
    """Token ids, of which the last `num_targets` are scored. is_cut: the first are left out."""

    ids: np.ndarray  # int32
    num_targets: int
    is_cut: bool = False


def packed_length(found: Sequence[Continuation], *, at_most: int) -> int:
    """Return the length of rows that hold these continuations, several in one."""
    lengths = [len(each.ids) - 1 for each in found]
    wanted = max(*lengths, min(_LEAST_SEQ_LEN, sum(lengths)))
    return min(-(-wanted // _MULTIPLE) * _MULTIPLE, at_most)


class ContinuationRows:
    """Continuations as rows of batches (B, T), in their order.

    packed: several share a row, with attention and positions of their own; else each has a row.
    """

    def __init__(self, found: Sequence[Continuation], seq_len: int, *, packed: bool = True) -> None:
        self.seq_len, self._packed = seq_len, packed
        self._counts = np.array([each.num_targets for each in found])
        self._rows: list[list[Continuation]] = []
        room = 0
        for each in found:
            inputs = len(each.ids) - 1
            if inputs > room or not packed:
                self._rows.append([])
                room = seq_len
            self._rows[-1].append(each)
            room -= inputs
        self.num_rows = len(self._rows)

    def batch(self, rows: range) -> dict[str, np.ndarray]:
        """Return these rows as arrays (B, T); those from `num_rows` on are padding."""
        shape, names = (len(rows), self.seq_len), ("tokens", "targets", "positions", "segment_ids")
        batch = {name: np.zeros(shape, np.int32) for name in names}
        batch["loss_mask"] = np.zeros(shape, bool)
        for row, number in enumerate(rows):
            begin = 0
            for segment, each in enumerate(self._rows[number] if number < self.num_rows else (), 1):
                end = begin + len(each.ids) - 1
                batch["tokens"][row, begin:end] = each.ids[:-1]
                batch["targets"][row, begin:end] = each.ids[1:]
                batch["positions"][row, begin:end] = np.arange(end - begin)
                batch["segment_ids"][row, begin:end] = segment
                batch["loss_mask"][row, end - each.num_targets : end] = True
                begin = end
        if not self._packed:
            del batch["segment_ids"]
        return batch

    def sums(self, found: Score) -> tuple[np.ndarray, np.ndarray]:
        """Return the loss of each continuation, float64 nats, and whether all of it is greedy."""
        starts = np.cumsum(self._counts) - self._counts
        nll = np.add.reduceat(found.per_token, starts, dtype=np.float64)
        return nll, np.logical_and.reduceat(found.greedy, starts)
