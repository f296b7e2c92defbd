"""Checkpoints of adapters: what they hold, the weights that they belong to, and the two merged.

Such a checkpoint names its base by path and fingerprint and does not hold it. Merging happens
tensor by tensor in float32, so that whatever reads weights reads these as well, in as little
memory. The formula of one matrix is that of `ops.lora.merged`.
"""

import dataclasses
import hashlib
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from llamajax.checkpoint.restore import Checkpoint, restore_state
from llamajax.config.schema import LORA_TARGETS, LoraConfig, ModelConfig
from llamajax.formats.foreign_weights import Index, TensorSource
from llamajax.formats.huggingface.hf_names import Row, tensors, to_theirs

PREFIX = "adapters/"
# Training changes nearly every value of every tensor, so a few rows of each tell two bases apart.
_FINGERPRINT_ROWS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factors:
    """A (L, in, R) and B (L, R, out) of one target, float32, `in` and `out` in our dims."""

    a: np.ndarray
    b: np.ndarray


def read_factors(checkpoint: Checkpoint) -> dict[str, Factors]:
    """The adapters of one checkpoint on the host, by target; to be called by all processes."""
    index = {n: x for n, x in checkpoint.arrays.items() if n.startswith(PREFIX)}
    targets = dict.fromkeys(name.split("/")[1] for name in index)
    wanted = {t: {side: index[f"{PREFIX}{t}/{side}"] for side in "ab"} for t in targets}
    found = restore_state(checkpoint, {"adapters": wanted}, partial=True)["adapters"]
    return {target: Factors(**found[target]) for target in targets}


class MergedSource:
    """The tensors of a base with adapters added to them; a TensorSource of float32 matrices.

    The base is rounded to the dtype in which it was held in training.
    """

    def __init__(
        self,
        base: TensorSource,
        model: ModelConfig,
        factors: Mapping[str, Factors],
        lora: LoraConfig,
    ):
        self._base, self._model, self._factors, self._lora = base, model, factors, lora
        self._tensors = {tensor.name: tensor for tensor in tensors(model)}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return np.dtype("float32")

    def where(self, name: str) -> str:
        return self._base.where(name)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        tensor = self._tensors[name]
        weight = self._base.read(name, index)
        if weight.ndim > 1:
            weight = weight.astype(jnp.dtype(self._lora.base_dtype))
        weight = weight.astype(np.float32)
        factors = self._factors.get(tensor.row.ours.rpartition("/")[2])
        if factors is None:
            return weight
        added = _product(factors, tensor.layer, tensor.row, self._model)
        scale = np.float32(self._lora.alpha / self._lora.rank)
        return weight + scale * (added if index is None else added[index])

    def close(self) -> None:
        self._base.close()


def _product(factors: Factors, layer: int, row: Row, model: ModelConfig) -> np.ndarray:
    """A B of one layer, in their layout."""
    a, b = factors.a[layer], factors.b[layer]
    product = a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[0], -1)
    inputs, outputs = LORA_TARGETS[row.ours.rpartition("/")[2]]
    return to_theirs(product.reshape(*a.shape[:-1], *b.shape[1:]), row, inputs + outputs, model)


def fingerprint_tensors(source: TensorSource, model: ModelConfig) -> str:
    """Identity of foreign weights: of the shape, dtype and first rows of each tensor."""
    digest = hashlib.sha256()
    available = set(source.names())
    for tensor in tensors(model):
        if tensor.name not in available:
            continue
        rows, *rest = tensor.shape
        index = (slice(0, min(rows, _FINGERPRINT_ROWS)), *(slice(0, n) for n in rest))
        part = source.read(tensor.name, index)
        digest.update(f"{tensor.name} {tensor.shape} {source.dtype(tensor.name).name}\n".encode())
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
