"""Our own weights as Hugging Face tensors: of a checkpoint, of a model in memory, with adapters.

Each is a `TensorSource`, so that what reads foreign weights reads ours as well, a layer at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamajax.checkpoint.restore import Checkpoint, check_same_model, restore_state
from llamajax.checkpoint.stored_array import StoredArray
from llamajax.config.schema import LoraConfig, ModelConfig
from llamajax.formats.foreign_weights import Index, TensorSource
from llamajax.formats.huggingface.hf_names import TABLE, Tensor, tensors, to_theirs
from llamajax.formats.huggingface.hf_read import named_weights
from llamajax.sharding import letters

_MODEL, _ADAPTERS = "model/", "adapters/"
AVERAGE = "average/"  # of whichever of the two is trained


class _LlamaSource(TensorSource):
    """What the sources share: names and shapes follow from the architecture."""

    def __init__(self, model: ModelConfig):
        self._model = model
        self._tensors = {tensor.name: tensor for tensor in tensors(model)}

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        tensor = self._tensors[name]
        array, dims = self._read_ours(tensor)
        theirs = to_theirs(array, tensor.row, dims, self._model)
        return theirs if index is None else theirs[index]

    def _read_ours(self, tensor: Tensor) -> tuple[np.ndarray, str]:
        """Return our array (a layer of a stacked weight, or a whole weight) and its dims."""
        raise NotImplementedError


class CheckpointSource(_LlamaSource):
    """The weights of one of our checkpoints. Holds one layer of one weight."""

    def __init__(
        self, checkpoint: Checkpoint, model: ModelConfig, abstract_model: Any, part: str | None
    ):
        """Raises UserError for damage, and for a checkpoint of another model.

        part: AVERAGE instead of the weights. To be called by all processes.
        """
        super().__init__(model)
        self._part = part or _MODEL
        weights = named_weights(abstract_model)
        wanted = {self._part + name: weight.get_value() for name, weight in weights.items()}
        check_same_model(checkpoint, wanted, model=None, partial=True, cast=True)
        checkpoint.verify()
        self._checkpoint = checkpoint
        self._dims = {name: letters(weight).removeprefix("L") for name, weight in weights.items()}
        self._opened: dict[str, StoredArray] = {}

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._checkpoint.arrays[self._part + self._tensors[name].row.ours].dtype)

    def where(self, name: str) -> str:
        return str(self._checkpoint)

    def _read_ours(self, tensor: Tensor) -> tuple[np.ndarray, str]:
        ours, layer = tensor.row.ours, tensor.layer
        if ours not in self._opened:
            self._opened[ours] = self._checkpoint.array(self._part + ours)
        stored = self._opened[ours]
        index = [slice(0, n) for n in stored.shape]
        if layer is None:
            return stored.read(tuple(index), stored.dtype), self._dims[ours]
        index[0] = slice(layer, layer + 1)
        return stored.read(tuple(index), stored.dtype)[0], self._dims[ours]


class ModelSource(_LlamaSource):
    """A model in memory, possibly sharded over processes.

    `read` gathers one layer of one weight and is to be called by all processes.
    """

    def __init__(self, model: Any, config: ModelConfig):
        super().__init__(config)
        self._weights = named_weights(model)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._weights[self._tensors[name].row.ours].get_value().dtype)

    def where(self, name: str) -> str:
        return "the model in memory"

    def _read_ours(self, tensor: Tensor) -> tuple[np.ndarray, str]:
        weight, layer = self._weights[tensor.row.ours], tensor.layer
        array, dims = weight.get_value(), letters(weight).removeprefix("L")
        mesh = getattr(array.sharding, "mesh", None)
        if mesh is None or mesh.size == 1:
            return np.asarray(array if layer is None else array[layer]), dims
        gathered = _all_gather_layer(array, layer or 0, stacked=layer is not None, mesh=mesh)
        return np.asarray(gathered), dims


@jax.jit(static_argnames=("stacked", "mesh"))
def _all_gather_layer(array: jax.Array, layer: int, *, stacked: bool, mesh: Mesh) -> jax.Array:
    if stacked:
        array = jax.lax.dynamic_index_in_dim(array, layer, axis=0, keepdims=False)
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec()))


class AveragedSource(_LlamaSource):
    """The uniform mean of several sources of one architecture, in float64, as float32."""

    def __init__(self, model: ModelConfig, sources: Sequence[TensorSource]):
        super().__init__(model)
        self._sources = sources

    def dtype(self, name: str) -> np.dtype:
        return np.dtype("float32")

    def where(self, name: str) -> str:
        return "the mean of " + ", ".join(source.where(name) for source in self._sources)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        total = np.zeros((), np.float64)
        for source in self._sources:
            total = total + source.read(name, index).astype(np.float64)
        return (total / len(self._sources)).astype(np.float32)


class Factors(NamedTuple):
    """A (L, in, R) and B (L, R, out) of one LoRA target, float32, `in` and `out` in our dims."""

    a: np.ndarray
    b: np.ndarray


def read_factors(checkpoint: Checkpoint, part: str | None = None) -> dict[str, Factors]:
    """Read the adapters of one checkpoint to the host, by target.

    part: AVERAGE instead of them. To be called by all processes.
    """
    part = part or _ADAPTERS
    index = {n: x for n, x in checkpoint.arrays.items() if n.startswith(part)}
    targets = dict.fromkeys(name.split("/")[1] for name in index)
    wanted = {t: {side: index[f"{part}{t}/{side}"] for side in "ab"} for t in targets}
    (found,) = restore_state(checkpoint, {part.strip("/"): wanted}, partial=True).values()
    return {target: Factors(**found[target]) for target in targets}


class Pair(NamedTuple):
    """The adapter of one matrix (out, in) of Hugging Face: A (R, in), B (out, R), float32."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def pairs_of(factors: Mapping[str, Factors], lora: LoraConfig) -> dict[str, Pair]:
    """Return adapters by the tensor that they are added to.

    `in` and `out` are our dims flattened, so nothing is permuted.
    """
    found = {}
    for row in TABLE:
        ours = factors.get(row.ours.rpartition("/")[2])
        for layer in range(0 if ours is None else len(ours.a)):
            a, b = ours.a[layer], ours.b[layer]
            pair = Pair(
                a.reshape(-1, a.shape[-1]).T, b.reshape(b.shape[0], -1).T, lora.alpha / lora.rank
            )
            found[row.theirs.format(layer)] = pair
    return found


class MergedSource(_LlamaSource):
    """A base with adapters added to its matrices, tensor by tensor in float32.

    base_dtype: the dtype to which the base's matrices were rounded in training; None: not rounded.
    replaced: tensors that stand for those of the base.
    """

    def __init__(
        self,
        base: TensorSource,
        model: ModelConfig,
        pairs: Mapping[str, Pair],
        *,
        base_dtype: str | None = None,
        replaced: TensorSource | None = None,
    ):
        super().__init__(model)
        self._base, self._pairs, self._base_dtype = base, pairs, base_dtype
        self._replaced = replaced
        self._in_replaced = set() if replaced is None else set(replaced.names())

    def dtype(self, name: str) -> np.dtype:
        return np.dtype("float32")

    def where(self, name: str) -> str:
        if name in self._in_replaced:
            return self._replaced.where(name)
        return self._base.where(name) + (" with adapters" if name in self._pairs else "")

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        if name in self._in_replaced:
            return self._replaced.read(name, index).astype(np.float32)
        weight = self._base.read(name, index)
        if weight.ndim > 1 and self._base_dtype is not None:
            weight = weight.astype(jnp.dtype(self._base_dtype))
        weight = weight.astype(np.float32)
        if name not in self._pairs:
            return weight
        a, b, scale = self._pairs[name]
        rows, columns = index or (slice(None), slice(None))
        return weight + np.float32(scale) * (b[rows] @ a[:, columns])
