"""Batches of samples, with the borders of the documents packed into them.

A batch is a dict of arrays (B, T), B the rows asked for:

- `tokens`, `targets` int32: target t is the token after token t (both view one array);
- `positions` int32: 0 at the start of the sample and of each document in it;
- `segment_ids` int32: 1, 2, ... for the documents in a sample, 0 for padding;
- `loss_mask` bool: False for padding, where the target is the first token of the next document,
  and in instruction data where the target belongs to no answer.

With `mask_documents` off a sample is one segment, and the next document's first token counts.
"""

from collections.abc import Sequence

import numpy as np

from llamajax.backends.jax_private.bare_grain import grain
from llamajax.data.mixture import Mixture, PreparedSplit
from llamajax.data.position import Position
from llamajax.data.shards import BLOCK_TOKENS

Batch = dict[str, np.ndarray]
BATCH_KEYS = ("tokens", "targets", "positions", "segment_ids", "loss_mask")


def sample_ids(
    mixture: Mixture, position: Position, step: int, *, at_most: int | None = None
) -> np.ndarray:
    """Return the ids (B,), int64, of the samples in the global batch of `step`, in row order.

    at_most: return the ids of every n-th row only, with the least n that gives no more than that.
    """
    segment = position.segment(step)
    order, first = mixture.order(segment.seq_len, segment.rounds), position.first_sample(step)
    stride = -(-segment.batch_size // at_most) if at_most else 1
    rows = range(first, first + segment.batch_size, stride)
    return np.array([order[i] for i in rows], np.int64)


def train_batches(
    mixture: Mixture,
    position: Position,
    *,
    first_step: int,
    rows: range,
    num_threads: int,
    prefetch: int,
) -> grain.DatasetIterator[Batch]:
    """Endless batches of the steps `first_step`, `first_step + 1`, ...: only `rows` of each.

    Close it (`.close()`) to end its threads. Their number and `prefetch`, the batches held ready,
    change speed only. ValueError if the position belongs to another mixture.
    """
    if position.segment(first_step).mixture_hash != mixture.hash:
        raise ValueError("the position is of another mixture: call Position.continued first")
    steps = _TrainSteps(mixture, position, first_step, rows)
    return _iterate(steps, num_threads=num_threads, prefetch=prefetch)


def eval_batches(
    mixture: Mixture,
    *,
    batch_size: int,
    seq_len: int,
    rows: range,
    max_batches: int | None = None,
    num_threads: int = 1,
    prefetch: int = 2,
) -> grain.DatasetIterator[Batch]:
    """Every target of the mixture once, in order; the last batch is filled up with padding.

    Several sources are interleaved evenly, so that the first `max_batches` stand for all.
    """
    steps = _EvalSteps(mixture, batch_size, seq_len, rows, max_batches)
    return _iterate(steps, num_threads=num_threads, prefetch=prefetch)


def num_eval_batches(mixture: Mixture, *, batch_size: int, seq_len: int) -> int:
    """Number of batches that `eval_batches` gives without `max_batches`."""
    return -(-sum(s.num_eval_samples(seq_len) for s in mixture.sources) // batch_size)


def _iterate(
    steps: "_TrainSteps | _EvalSteps", *, num_threads: int, prefetch: int
) -> grain.DatasetIterator[Batch]:
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(steps).to_iter_dataset(options))


class _TrainSteps:
    """Random access to batches by step, as a source for grain."""

    def __init__(self, mixture: Mixture, position: Position, first_step: int, rows: range) -> None:
        self._mixture, self._position = mixture, position
        self._first_step, self._rows = first_step, rows
        segment = position.segment(first_step)
        mixture.order(segment.seq_len, segment.rounds)  # a set too small is refused here

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> Batch:
        step = self._first_step + index
        segment = self._position.segment(step)
        seq_len, first = segment.seq_len, self._position.first_sample(step)
        order = self._mixture.order(seq_len, segment.rounds)
        samples = [self._mixture.locate(int(order[first + r]), seq_len) for r in self._rows]
        return make_batch(samples, seq_len, mask_documents=self._mixture.mask_documents)


class _EvalSteps:
    """Random access to the batches of an evaluation, as a source for grain."""

    def __init__(
        self, mixture: Mixture, batch_size: int, seq_len: int, rows: range, limit: int | None
    ) -> None:
        self._mixture, self._batch_size, self._seq_len = mixture, batch_size, seq_len
        self._rows = rows
        counts = [s.num_eval_samples(seq_len) for s in mixture.sources]
        source = np.repeat(np.arange(len(counts)), counts)
        number = np.concatenate([np.arange(c) for c in counts])
        place = np.concatenate([(np.arange(c) + 0.5) / c for c in counts if c])
        order = np.argsort(place, kind="stable")
        self._samples = np.stack([source, number], axis=1)[order].tolist()
        batches = num_eval_batches(mixture, batch_size=batch_size, seq_len=seq_len)
        self._num_batches = batches if limit is None else min(limit, batches)

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, index: int) -> Batch:
        samples: list[tuple[PreparedSplit, int] | None] = []
        for row in self._rows:
            place = index * self._batch_size + row
            if place < len(self._samples):
                source, number = self._samples[place]
                samples.append((self._mixture.sources[source], number))
            else:
                samples.append(None)
        return make_batch(samples, self._seq_len, mask_documents=self._mixture.mask_documents)


def make_batch(
    samples: Sequence[tuple[PreparedSplit, int] | None], seq_len: int, *, mask_documents: bool
) -> Batch:
    """The batch of these samples (source, number), one a row; None is a row of padding.

    Works on the whole batch at once: a loop over tokens or rows would cost more than reading.
    """
    window, answer, lengths, starts, rows = _read(samples, seq_len)
    num_rows = len(samples)
    loss_mask = np.ones(num_rows * seq_len, bool)
    if mask_documents:
        inside = starts > 0
        loss_mask[rows[inside] * seq_len + starts[inside] - 1] = False
        inside &= starts < seq_len
        rows, starts = rows[inside], starts[inside]
    else:
        rows, starts = rows[:0], starts[:0]
    # A segment starts with every row, and with every document inside a row.
    borders = np.concatenate([np.arange(num_rows) * seq_len, rows * seq_len + starts])
    borders.sort()
    sizes = np.empty_like(borders)
    sizes[:-1] = borders[1:] - borders[:-1]
    sizes[-1] = num_rows * seq_len - borders[-1]
    per_row = 1 + np.bincount(rows, minlength=num_rows)
    before = np.repeat(np.cumsum(per_row) - per_row, per_row)
    segment_ids = np.repeat((np.arange(len(borders)) - before + 1).astype(np.int32), sizes)
    positions = np.arange(num_rows * seq_len, dtype=np.int32)
    positions -= np.repeat(borders.astype(np.int32), sizes)
    batch = {
        "tokens": window[:, :-1],  # views: two copies would take a tenth of the time
        "targets": window[:, 1:],
        "positions": positions.reshape(num_rows, seq_len),
        "segment_ids": segment_ids.reshape(num_rows, seq_len),
        "loss_mask": loss_mask.reshape(num_rows, seq_len),
    }
    if answer is not None:
        batch["loss_mask"] &= answer[:, 1:]
    for row in np.flatnonzero(lengths <= seq_len):
        num_targets = max(0, lengths[row] - 1)
        for name in ("positions", "segment_ids", "loss_mask"):
            batch[name][row, num_targets:] = 0
    return batch


def _read(
    samples: Sequence[tuple[PreparedSplit, int] | None], seq_len: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (B, T + 1) with 0 where there are none; which carry loss (B, T + 1), None if all do;
    how many there are a row (B,); and the offsets of document starts in 0..T with their rows."""
    window = np.zeros((len(samples), seq_len + 1), np.int32)
    lengths = np.zeros(len(samples), np.int64)
    wanted: dict[PreparedSplit, list[tuple[int, int]]] = {}
    for row, sample in enumerate(samples):
        if sample is None:
            continue
        source, number = sample
        first = number * seq_len
        end = min(first + seq_len, source.num_tokens - 1)  # the last token is in end's record too
        lengths[row] = end - first + 1
        blocks = range(first // BLOCK_TOKENS, (end - 1) // BLOCK_TOKENS + 1)
        wanted.setdefault(source, []).extend((row, block) for block in blocks)
    answer = np.ones(window.shape, bool) if any(s.masked for s in wanted) else None
    found: list[np.ndarray] = [np.empty(0, np.uint32)]
    facts: list[tuple[int, int, int]] = [
        (0, 0, 0)
    ]  # of each in `found`: size, row, its block's place
    for source, places in wanted.items():
        records = source.reader.blocks([block for _, block in places])
        for (row, block), (tokens, offsets, carries) in zip(places, records, strict=True):
            at = block * BLOCK_TOKENS - samples[row][1] * seq_len
            begin, end = max(at, 0), min(at + len(tokens), seq_len + 1)
            window[row, begin:end] = tokens[begin - at : end - at]
            if carries is not None:
                answer[row, begin:end] = carries[begin - at : end - at]
            found.append(offsets)
            facts.append((len(offsets), row, at))
    offsets, (sizes, rows, ats) = np.concatenate(found), np.array(facts).T
    rows = np.repeat(rows, sizes)
    starts = offsets + np.repeat(ats, sizes)
    keep = (starts >= 0) & (starts < lengths[rows])
    # The one token that two records share counts here only where it ends the window.
    keep &= (offsets < BLOCK_TOKENS) | (starts == lengths[rows] - 1)
    return window, answer, lengths, starts[keep], rows[keep]
