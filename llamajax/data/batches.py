"""Batches of samples, with the borders of the documents packed into them.

A batch is a dict of arrays (B, T), B the rows asked for:

- `tokens`, `targets` int32: target t is the token after token t (both view one array);
- `positions` int32: 0 at the start of the sample and of each document or example in it;
- `segment_ids` int32: 1, 2, ... for the documents or examples in a sample, 0 for padding;
- `loss_mask` bool: False for padding, where the target is the first token of the next document,
  and in instruction data where the target belongs to no answer.

With `mask_documents` off a sample is one segment, and the next document's first token counts, but
not that of the next whole example.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llamajax.backends.jax_private.bare_grain import grain
from llamajax.data.mixture import Mixture, Sample
from llamajax.data.position import Position
from llamajax.data.prepared_split import PreparedSplit
from llamajax.data.shards import BLOCK_TOKENS

Batch = dict[str, np.ndarray]


def sample_ids(
    mixture: Mixture, position: Position, step: int, *, rows: range | None = None
) -> np.ndarray:
    """Return the ids (B,), int64, of the samples in these rows of the global batch of `step`.

    rows: None for all.
    """
    segment, first = position.segment(step), position.first_sample(step)
    order = mixture.order(segment.seq_len, segment.packing, segment.rounds, segment.starts)
    rows = range(segment.batch_size) if rows is None else rows
    return np.array([order[first + row] for row in rows], np.int64)


def train_batches(
    mixtures: Mapping[str, Mixture],
    position: Position,
    *,
    first_step: int,
    rows: Callable[[int], range],
    num_threads: int,
    prefetch: int,
) -> grain.DatasetIterator[Batch]:
    """Iterate without end over the batches of steps `first_step`, ...: only `rows` of each.

    mixtures: by hash, all that the position has from `first_step` on. rows: of this process, in a
    global batch of this size. Close it (`.close()`) to end its threads. Their number and
    `prefetch`, the batches held ready, change speed only. ValueError if a mixture is not there.
    """
    later = [segment for segment in position.segments if segment.first_step > first_step]
    for segment in (position.segment(first_step), *later):
        if segment.mixture_hash not in mixtures:
            raise ValueError("the position is of another mixture: call Position.continued first")
        # Made before there are threads. UserError for data shorter than a sample.
        sample_ids(mixtures[segment.mixture_hash], position, segment.first_step, rows=range(1))

    def read(index: int) -> Batch:
        step = first_step + index
        segment = position.segment(step)
        mixture, seq_len = mixtures[segment.mixture_hash], segment.seq_len
        ids = sample_ids(mixture, position, step, rows=rows(segment.batch_size))
        samples = [mixture.locate(int(i), seq_len, segment.packing) for i in ids]
        return make_batch(samples, seq_len, mask_documents=mixture.mask_documents)

    return _iterate(read, 2**62, num_threads=num_threads, prefetch=prefetch)


def eval_batches(
    mixture: Mixture,
    *,
    batch_size: int,
    seq_len: int,
    packing: str,
    rows: range,
    max_batches: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """Iterate over every target of the mixture once; padding fills the last batch.

    packing: of instruction data. Several sources are interleaved evenly, so that the first
    `max_batches` represent all.
    """
    samples = [source.samples(seq_len, packing) for source in mixture.sources]
    counts = [each.count_all for each in samples]
    source = np.repeat(np.arange(len(counts)), counts)
    number = np.concatenate([np.arange(c) for c in counts])
    progress = np.concatenate([(np.arange(c) + 0.5) / c for c in counts if c])
    order = np.argsort(progress, kind="stable")
    num_batches = -(-len(order) // batch_size)

    def sample(index: int) -> Sample | None:
        if index >= len(order):
            return None
        of, n = source[order[index]], int(number[order[index]])
        return Sample(mixture.sources[of], n, samples[of].pieces(n))

    def read(index: int) -> Batch:
        drawn = [sample(index * batch_size + row) for row in rows]
        return make_batch(drawn, seq_len, mask_documents=mixture.mask_documents)

    if max_batches is not None:
        num_batches = min(max_batches, num_batches)
    return _iterate(read, num_batches, num_threads=1, prefetch=2)


def _iterate(
    read: Callable[[int], Batch], num_batches: int, *, num_threads: int, prefetch: int
) -> grain.DatasetIterator[Batch]:
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.range(num_batches).map(read).to_iter_dataset(options))


def make_batch(samples: Sequence[Sample | None], seq_len: int, *, mask_documents: bool) -> Batch:
    """Build the batch of these samples, one a row; None is a row of padding.

    Works on the whole batch at once: a loop over tokens or rows would cost more than reading.
    """
    window, answer, lengths, (rows, starts) = _read(samples, seq_len, mask_documents)
    num_rows = len(samples)
    loss_mask = np.ones(num_rows * seq_len, bool)
    loss_mask[rows * seq_len + starts - 1] = False
    inside = (starts < seq_len) & mask_documents
    rows, starts = rows[inside], starts[inside]
    # A segment starts with every row, and with every document inside a row.
    borders = np.concatenate([np.arange(num_rows) * seq_len, rows * seq_len + starts])
    borders.sort()
    sizes = np.diff(borders, append=num_rows * seq_len)
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


class _Part(NamedTuple):
    """A piece [first, end) of a stream, as far as it is in one block.

    shift: from a place in the stream to that in the row.
    """

    block: int
    row: int
    shift: int
    first: int
    end: int


def _read(
    samples: Sequence[Sample | None], seq_len: int, mask_documents: bool
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
    """Read the samples' tokens, and where pieces, and documents to be masked, start in a row.

    Returns the tokens (B, T + 1), 0 where there are none; which carry loss (B, T + 1), None if all
    do; their number in each row (B,); rows and offsets (2, starts), those at the first token not.
    """
    window = np.zeros((len(samples), seq_len + 1), np.int32)
    lengths = np.zeros(len(samples), np.int64)
    pieces: list[tuple[int, int]] = []
    wanted: dict[PreparedSplit, list[_Part]] = {}
    for row, sample in enumerate(samples):
        for first, size in () if sample is None else sample.pieces.tolist():
            begin, end = int(lengths[row]), first + size
            if begin:
                pieces.append((row, begin))
            # The last token is also in the record of the one before.
            blocks = range(first // BLOCK_TOKENS, max(first, end - 2) // BLOCK_TOKENS + 1)
            parts = [_Part(block, row, begin - first, first, end) for block in blocks]
            wanted.setdefault(sample.source, []).extend(parts)
            lengths[row] += size
    answer = np.ones(window.shape, bool) if any(s.masked for s in wanted) else None
    # Document starts of each block, and the part that was read of it.
    found, read = [np.empty(0, np.uint32)], [_Part(0, 0, 0, 0, 0)]
    for source, parts in wanted.items():
        blocks = source.blocks([part.block for part in parts])
        for part, block in zip(parts, blocks, strict=True):
            at = part.block * BLOCK_TOKENS
            low, high = max(at, part.first), min(at + len(block.tokens), part.end)
            here, there = slice(low + part.shift, high + part.shift), slice(low - at, high - at)
            window[part.row, here] = block.tokens[there]
            if block.answer is not None:
                answer[part.row, here] = block.answer[there]
            found.append(block.starts)
        read += parts
    offsets, columns = np.concatenate(found), np.array(read).T
    block, rows, shift, first, end = np.repeat(columns, list(map(len, found)), axis=1)
    starts = offsets + block * BLOCK_TOKENS
    keep = (starts > first) & (starts < end) & mask_documents
    # The one token that two records share counts here only where it ends the piece.
    keep &= (offsets < BLOCK_TOKENS) | (starts == end - 1)
    documents = np.stack([rows, starts + shift])[:, keep]
    borders = [np.array(pieces, np.int64).reshape(-1, 2).T, documents]
    return window, answer, lengths, np.concatenate(borders, axis=1)
