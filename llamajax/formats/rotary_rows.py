"""Matrices whose rows stand in Meta's order: rotary pairs (i, i + 1) instead of (i, i + H/2).

Meta's own files and llama.cpp's GGUF keep the rows of q and k so; Hugging Face's and ours are
half-split. Both readers select rows through here, so that a slice of a matrix is read as one.
"""

from collections.abc import Sequence

import numpy as np

from llamajax.formats.tensor_source import Index


def half_split_rows(num_heads: int, head_size: int) -> np.ndarray:
    """For each row of the half-split matrix (N * H), the row of the interleaved one."""
    rows = np.arange(num_heads * head_size).reshape(num_heads, head_size // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def select(shape: Sequence[int], index: Index | None) -> tuple[tuple[int, ...], range, range]:
    """What `array[index]` of an array of one or two dims takes: its shape, rows and columns.

    A vector is one row. `index` holds one slice a dim, of step 1; None takes all.
    """
    slices = index if index is not None else (slice(None),) * len(shape)
    ranges = [range(n)[s] for n, s in zip(shape, slices, strict=True)]
    taken = tuple(len(r) for r in ranges)
    return taken, (ranges[0] if len(ranges) == 2 else range(1)), ranges[-1]
