"""A checkpoint's weights as tensors of Hugging Face, one layer at a time."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from llamajax.checkpoint.restore import Checkpoint, check_same_model
from llamajax.checkpoint.stored_array import StoredArray
from llamajax.config.schema import ModelConfig
from llamajax.formats.foreign_weights import Index
from llamajax.formats.huggingface.hf_names import Tensor, tensors, to_theirs
from llamajax.formats.huggingface.hf_read import named_weights
from llamajax.sharding import letters

_PREFIX = "model/"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A weight as stored: shape, dtype, dimension letters (with a leading L)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    dims: str


def weight_leaves(abstract_model: Any) -> dict[str, Leaf]:
    """The leaves of a model of `jax.ShapeDtypeStruct`s by name."""
    return {
        name: Leaf(weight.get_value().shape, np.dtype(weight.get_value().dtype), letters(weight))
        for name, weight in named_weights(abstract_model).items()
    }


class CheckpointSource:
    """The weights of one checkpoint of ours as tensors of Hugging Face; a TensorSource.

    Holds one layer of one weight, also where all its layers are stored together.
    """

    def __init__(self, checkpoint: Checkpoint, model: ModelConfig, leaves: Mapping[str, Leaf]):
        """leaves: the model's. Raises UserError for damage, and for another model's checkpoint.

        To be called by all processes.
        """
        wanted = {_PREFIX + name: leaf for name, leaf in leaves.items()}
        check_same_model(checkpoint, wanted, model=None, partial=True, cast=True)
        checkpoint.verify()
        self._checkpoint, self._model, self._leaves = checkpoint, model, leaves
        self._tensors = {tensor.name: tensor for tensor in tensors(model)}
        self._opened: dict[str, StoredArray] = {}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._checkpoint.arrays[_PREFIX + self._tensors[name].row.ours].dtype)

    def where(self, name: str) -> str:
        return str(self._checkpoint.directory)

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
            self._opened[ours] = self._checkpoint.array(_PREFIX + ours)
        stored = self._opened[ours]
        index = [slice(0, n) for n in stored.shape]
        if layer is None:
            return stored.read(tuple(index), stored.dtype)
        return stored.read((slice(layer, layer + 1), *index[1:]), stored.dtype)[0]
