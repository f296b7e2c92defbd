"""Read Meta's checkpoints as Hugging Face tensors, their model-parallel shards joined.

`consolidated.00.pth`, `consolidated.01.pth` ... each hold a part of every matrix. Which dimension
was split is a property of the matrix. The exception is the embedding: Llama 2 splits its columns,
Llama 3 its rows.
"""

import dataclasses
from pathlib import Path

import numpy as np

from llamajax.errors import combine
from llamajax.formats.foreign_weights import Index, TensorSource, half_split_rows, select
from llamajax.formats.huggingface.hf_names import ROWS, Row, find_row
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
        self._directory = files[0].parent
        shards = [read_tensors(file) for file in files]
        self._tensors: dict[str, _Joined] = {}
        problems = []
        for theirs in dict.fromkeys(name for shard in shards for name in shard):
            if theirs == _BUFFER:
                continue
            row, name = find_row(theirs, Row.meta_name)
            parts = [shard[theirs] for shard in shards if theirs in shard]
            if row is None:
                problems.append(f"tensor {theirs}: no part of a Llama language model")
                continue
            split = _split_of(row)
            heads = {"q_proj": num_heads, "k_proj": num_kv_heads}.get(name.split(".")[-2])
            if len(parts) != len(shards):
                problems.append(f"tensor {theirs}: in {len(parts)} of {len(shards)} files only")
            elif problem := _mismatch(parts, split):
                problems.append(f"tensor {theirs}: {problem}")
            else:
                by_rows = parts[0].shape[-1] == hidden_size  # asked of the embedding only
                joined = _Joined(parts, split or (_ROWS if by_rows else _COLUMNS))
                rows = joined.shape[0]
                if heads and rows % (2 * heads):
                    problems.append(f"tensor {theirs}: {rows} rows are no {heads} heads")
                elif heads:
                    order = half_split_rows(heads, rows // heads)
                    joined = dataclasses.replace(joined, order=order)
                self._tensors[name] = joined
        if problems:
            title = f"{self._directory}: tensors that cannot be imported:"
            raise combine(problems, title=title, listed=10)

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


def _split_of(row: Row) -> str | None:
    """Return how Meta splits a tensor; None: the embedding, which only its shape tells."""
    if row.ours == "embedding":
        return None
    first, *rest = row.layout.split()
    return _SAME if not rest else _COLUMNS if first == "D" else _ROWS


def _mismatch(parts: list[np.ndarray], split: str | None) -> str | None:
    """Return why the parts of a tensor do not belong together, or None."""
    kinds = {(part.shape, str(part.dtype)) for part in parts}
    if len(kinds) > 1:
        return f"the files hold parts of different shapes or types: {sorted(kinds)}"
    if parts[0].ndim != (1 if split == _SAME else 2):
        return f"of shape {parts[0].shape}"
    return None


def _copy_rows(target: np.ndarray, source: np.ndarray, stored: np.ndarray) -> None:
    """Copy rows `stored` of `source`; those outside of it are another shard's."""
    (here,) = np.nonzero((stored >= 0) & (stored < len(source)))
    for start in range(0, len(here), _CHUNK_ROWS):
        chunk = here[start : start + _CHUNK_ROWS]
        target[chunk] = source[stored[chunk]]
