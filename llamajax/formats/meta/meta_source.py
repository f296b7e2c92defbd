"""Read Meta's checkpoints as Hugging Face tensors, their model-parallel shards joined.

`consolidated.00.pth`, `consolidated.01.pth` ... each hold a part of every matrix. Which dimension
was split is a property of the matrix. The exception is the embedding: Llama 2 splits its columns,
Llama 3 its rows.
"""

import dataclasses
from pathlib import Path

import numpy as np

from llamajax.formats.foreign_weights import Index, TensorSource, select
from llamajax.formats.huggingface.hf_names import ROWS, Row, interleaved_rows, renamed_tensors
from llamajax.formats.meta.torch_pickle import read_tensors

EMBEDDING, HEAD = ROWS["embedding"].theirs, ROWS["head"].theirs
_ROWS, _COLUMNS, _SAME = "rows", "columns", "same"
_BUFFER = "rope.freqs"  # computed, yet stored by Llama 1 and 2
_CHUNK_ROWS = 1024  # copied at one time


@dataclasses.dataclass(frozen=True)
class _Joined:
    """The parts of a tensor; order: stored row of each row, of q and k."""

    parts: list[np.ndarray]
    split: str
    order: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        if self.split != _SAME:
            shape[self.split == _COLUMNS] *= len(self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype


class MetaSource(TensorSource):
    """The tensors of one checkpoint."""

    def __init__(
        self, files: list[Path], *, hidden_size: int, num_heads: int, num_kv_heads: int
    ) -> None:
        self._directory, heads = files[0].parent, (num_heads, num_kv_heads)
        shards = [read_tensors(file) for file in files]

        def join(row: Row, name: str) -> _Joined:
            parts = [shard[name] for shard in shards if name in shard]
            if len(parts) != len(shards):
                raise ValueError(f"in {len(parts)} of {len(shards)} files only")
            joined = _Joined(parts, _split_of(row, parts, hidden_size))
            order = interleaved_rows(row, joined.shape[0], heads)
            return dataclasses.replace(joined, order=order)

        self._tensors: dict[str, _Joined] = renamed_tensors(
            dict.fromkeys(name for shard in shards for name in shard if name != _BUFFER),
            Row.meta_name,
            join,
            path=self._directory,
        )

    def where(self, name: str) -> str:
        return str(self._directory)  # each file holds a part

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Join the parts, with the rows of q and k half-split."""
        joined = self._tensors[name]
        taken, rows, columns = select(joined.shape, index)
        parts = [part.reshape(1, -1) if part.ndim == 1 else part for part in joined.parts]
        found = np.empty((len(rows), len(columns)), joined.dtype)
        height, width = parts[0].shape
        for number, part in enumerate(parts[:1] if joined.split == _SAME else parts):
            top = number * height if joined.split == _ROWS else 0
            left = number * width if joined.split == _COLUMNS else 0
            here = range(max(columns.start, left), min(columns.stop, left + width))
            if not here:
                continue
            target = found[:, here.start - columns.start : here.stop - columns.start]
            source = part[:, here.start - left : here.stop - left]
            stored = np.array(rows) if joined.order is None else joined.order[rows]
            _copy_rows(target, source, stored - top)
        return found.reshape(taken)


def _split_of(row: Row, parts: list[np.ndarray], hidden_size: int) -> str:
    """Return how Meta split a tensor. ValueError says why its parts do not belong together."""
    kinds = {(part.shape, str(part.dtype)) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"the files hold parts of different shapes or types: {sorted(kinds)}")
    first, *rest = row.layout.split()
    if parts[0].ndim != 1 + len(rest):
        raise ValueError(f"of shape {parts[0].shape}")
    if row.ours == "embedding":
        return _ROWS if parts[0].shape[1] == hidden_size else _COLUMNS
    return _SAME if not rest else _COLUMNS if first == "D" else _ROWS


def _copy_rows(target: np.ndarray, source: np.ndarray, stored: np.ndarray) -> None:
    """Copy rows `stored` of `source`; those outside of it are another shard's."""
    (here,) = np.nonzero((stored >= 0) & (stored < len(source)))
    for start in range(0, len(here), _CHUNK_ROWS):
        chunk = here[start : start + _CHUNK_ROWS]
        target[chunk] = source[stored[chunk]]
