"""A checkpoint's weights read and written one layer at a time, by whoever has no room for them all.

`Checkpointer` and `restore_state` go through Orbax, which takes and gives whole arrays. This is for
converting: the same files (one zarr array a leaf in an OCDBT store, Orbax's `_METADATA` beside it)
through TensorStore, so that `restore_state` reads what is written here and the other way round.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from llamajax.checkpoint import manifest as manifests
from llamajax.checkpoint.directory import check_target, replaced
from llamajax.checkpoint.hf_names import ROWS, Tensor, tensors, to_theirs
from llamajax.checkpoint.hf_read import check_tied_head, named_weights, read_weight
from llamajax.checkpoint.manifest import DamagedError
from llamajax.checkpoint.parts import StoredArray, array_spec
from llamajax.checkpoint.restore import check_same_model, damaged, read_arrays_index
from llamajax.checkpoint.storage import Place
from llamajax.checkpoint.tensor_source import Index, TensorSource
from llamajax.config.schema import ModelConfig
from llamajax.sharding import letters

# Blocks of a weight without layers, such as the embedding.
_BLOCK_BYTES = 1 << 27
_PREFIX = "model/"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A weight to be stored: shape, dtype, dimension letters as stored (with a leading L)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    dims: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def leaves_of(abstract_model: Any) -> dict[str, Leaf]:
    """The leaves of a model of `jax.ShapeDtypeStruct`s by name."""
    return {
        name: Leaf(weight.get_value().shape, np.dtype(weight.get_value().dtype), letters(weight))
        for name, weight in named_weights(abstract_model).items()
    }


def write_llamajax(
    source: TensorSource,
    model: ModelConfig,
    directory: Path,
    *,
    leaves: Mapping[str, Leaf],
    step: int,
    write_tokenizer: Callable[[Path], None],
    overwrite: bool,
    progress: Callable[[int, int], None],
) -> None:
    """Write tensors as a directory that `open_weights` takes: `checkpoints/STEP`, tokenizer.

    The directory appears whole or not at all. Raises UserError when it cannot be written.
    """
    check_tied_head(source, model)
    needed = sum(leaf.num_bytes for leaf in leaves.values())
    check_target(directory, overwrite=overwrite, needed_bytes=needed)

    def read(name: str, index: Index) -> np.ndarray:
        return read_weight(source, ROWS[name], leaves[name].dims, index, leaves[name].dtype, model)

    with replaced(directory) as hidden:
        meta = {"config": {"model": dataclasses.asdict(model)}}
        checkpoint = hidden / "checkpoints" / str(step)
        write_checkpoint(checkpoint, leaves, read, meta=meta, progress=progress)
        write_tokenizer(hidden)


class StoredSource:
    """The weights of one checkpoint of ours as tensors of Hugging Face; a TensorSource.

    Holds one layer of one weight, also where all its layers are stored together.
    """

    def __init__(self, directory: Place, model: ModelConfig, leaves: Mapping[str, Leaf]):
        """leaves: the model's. Raises UserError for damage, and for another model's checkpoint."""
        wanted = {_PREFIX + name: leaf for name, leaf in leaves.items()}
        check_same_model(directory, wanted, model=None, partial=True, cast=True)
        try:
            manifests.check_contents(directory)
        except DamagedError as error:
            raise damaged(directory, str(error)) from None
        self._directory, self._model, self._leaves = directory, model, leaves
        self._tensors = {tensor.name: tensor for tensor in tensors(model)}
        self._index = read_arrays_index(directory)
        self._opened: dict[str, StoredArray] = {}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._index[_PREFIX + self._tensors[name].row.ours].dtype)

    def where(self, name: str) -> str:
        return str(self._directory)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        tensor = self._tensors[name]
        dims = self._leaves[tensor.row.ours].dims.removeprefix("L")
        theirs = to_theirs(self._layer(tensor), tensor.row, dims, self._model)
        return theirs if index is None else theirs[index]

    def close(self) -> None:
        self._opened.clear()

    def _layer(self, tensor: Tensor) -> np.ndarray:
        """Our array of one tensor: a layer of a stacked weight, or a whole one."""
        ours, layer = tensor.row.ours, tensor.layer
        if ours not in self._opened:
            state = self._directory / manifests.STATE
            self._opened[ours] = StoredArray(state, _PREFIX + ours)
        stored = self._opened[ours]
        index = [slice(0, n) for n in stored.shape]
        if layer is None:
            return stored.read(tuple(index), stored.dtype)
        return stored.read((slice(layer, layer + 1), *index[1:]), stored.dtype)[0]


def write_checkpoint(
    directory: Path,
    leaves: Mapping[str, Leaf],
    read: Callable[[str, Index], np.ndarray],
    *,
    meta: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a checkpoint (`checkpoints/STEP`, not there yet) of weights alone, block by block.

    read: the part `index` (slices with bounds) of one leaf, in the leaf's dtype. `directory` is
    complete when this returns; to be called inside a directory that nobody sees yet.
    Raises OSError when the disk refuses.
    """
    state = directory / manifests.STATE
    state.mkdir(parents=True)
    done, total = 0, sum(leaf.num_bytes for leaf in leaves.values())
    for name, leaf in leaves.items():
        array = _create(state, _PREFIX + name, leaf)
        for index in _blocks(leaf):
            part = read(name, index)
            try:
                array[index].write(part).result()
            except ValueError as error:  # TensorStore's for all that the system refuses
                raise OSError(f"{state}: {error}") from None
            done += part.nbytes
            if progress is not None:
                progress(done, total)
    (state / "_METADATA").write_text(json.dumps(_orbax_metadata(leaves)), "utf-8")
    manifests.write_durably(directory / manifests.META, json.dumps(meta, indent=1))
    arrays = {_PREFIX + name: (leaf.dtype.name, leaf.shape) for name, leaf in leaves.items()}
    manifests.seal(directory, step=int(directory.name), arrays=arrays)


def _rows(leaf: Leaf) -> int:
    """Entries of the first dimension that are stored together."""
    if leaf.dims[0] == "L" and len(leaf.dims) > 2:
        return 1
    row_bytes = math.prod(leaf.shape[1:]) * leaf.dtype.itemsize
    return min(leaf.shape[0], max(1, _BLOCK_BYTES // row_bytes))


def _blocks(leaf: Leaf) -> Iterator[Index]:
    rows, rest = _rows(leaf), tuple(slice(0, n) for n in leaf.shape[1:])
    for start in range(0, leaf.shape[0], rows):
        yield (slice(start, min(start + rows, leaf.shape[0])), *rest)


def _create(state: Path, name: str, leaf: Leaf) -> ts.TensorStore:
    metadata = {
        "shape": leaf.shape,
        "chunks": [_rows(leaf), *leaf.shape[1:]],
        "dtype": "bfloat16" if leaf.dtype.name == "bfloat16" else leaf.dtype.str,
        "compressor": None,
    }
    spec = array_spec(state, name) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
    return ts.open(spec, create=True).result()


def _orbax_metadata(leaves: Mapping[str, Leaf]) -> dict[str, Any]:
    """Orbax's description of a flat tree of arrays."""
    return {
        "tree_metadata": {
            str((_PREFIX + name,)): {
                "key_metadata": [{"key": _PREFIX + name, "key_type": 2}],
                "value_metadata": {
                    "value_type": "jax.Array",
                    "skip_deserialize": False,
                    "write_shape": list(leaf.shape),
                },
            }
            for name, leaf in leaves.items()
        },
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
