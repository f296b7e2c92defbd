"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): y = x W + (alpha / rank) dropout(x) A B.

Adapters are a tree of their own, `{target: Adapter}`, stacked over layers like the blocks: they are
trained, saved and counted without the model. `attach` puts them beside the weights that they adapt,
where `project` finds them.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llamajax.config.schema import LORA_TARGETS, LoraConfig, ModelConfig
from llamajax.models.declare import named_key
from llamajax.ops.dropout import dropout
from llamajax.ops.linear import float8_scale, linear
from llamajax.sharding import WEIGHTS
from llamajax.sharding.axes import axes_of
from llamajax.sharding.collectives import pmax
from llamajax.sharding.float8 import Float8, Float8Weight

# The module of a Block that holds the matrix of each target.
MODULES = {
    target: "mlp" if "F" in inputs + outputs else "attention"
    for target, (inputs, outputs) in LORA_TARGETS.items()
}


class Adapter(nnx.Module):
    """The factors A (in, R) and B (R, out) of one matrix, float32; R is never split.

    A is uniform in +-1/sqrt(inputs), as PEFT draws it; B is zero, so that training starts from
    the base model exactly. Both are functions of the key and the published sizes, on every mesh.
    """

    def __init__(self, config: ModelConfig, lora: LoraConfig, target: str, key: jax.Array):
        inputs, outputs = LORA_TARGETS[target]
        dims = config.dims | {"R": lora.rank}
        self.target = target
        self.scale = lora.alpha / lora.rank
        self.dropout = lora.dropout
        shape = tuple(dims[d] for d in inputs + "R")
        bound = math.prod(shape[:-1]) ** -0.5
        a = jax.random.uniform(named_key(key, target), shape, jnp.float32, -bound, bound)
        self.a = nnx.Param(a, axes=inputs + "R")
        b = jnp.zeros(tuple(dims[d] for d in "R" + outputs), jnp.float32)
        self.b = nnx.Param(b, axes="R" + outputs)

    def __call__(self, x: jax.Array, keys_BT: jax.Array | None) -> jax.Array:
        """Compute what is added to `x` times the adapted matrix; dtype of `x`."""
        inputs = self.a.axes[:-1]
        if keys_BT is not None and self.dropout:
            # One mask an input: query, key and value have the same one, gate and up as well.
            number = zlib.crc32(f"{MODULES[self.target]}/{inputs}".encode())
            split = "tensor" in axes_of(WEIGHTS.get(inputs[0]))
            x = dropout(x, fold_in(keys_BT, number, word=1), rate=self.dropout, split=split)
        x_BTR = linear(x, self.a[...], contract=len(inputs))
        return linear(x_BTR, self.b[...]) * self.scale


Adapters = dict[str, Adapter]


def project(
    x: jax.Array,
    weight: nnx.Param,
    adapter: Adapter | None,
    keys_BT: jax.Array | None,
    *,
    contract: int = 1,
) -> jax.Array:
    """Multiply `x` by a matrix, and add its adapter if it has one; `keys_BT` for dropout.

    The sum has the name "product": where a remat policy keeps it, both products that it is made of
    are not needed again.
    """
    y = linear(x, weight.get_value(), contract=contract)
    return y if adapter is None else checkpoint_name(y + adapter(x, keys_BT), "product")


def with_scales(blocks: Any, float8: Float8 | None) -> Any:
    """Copy stacked blocks, sharing their arrays, with the matrices for products in 8 bits marked.

    Their scales come from the stored values, once for all layers.
    """
    if float8 is None:
        return blocks
    blocks = jax.tree.unflatten(jax.tree.structure(blocks), jax.tree.leaves(blocks))
    for target in float8.targets:
        module = getattr(blocks, MODULES[target])
        weight, scale = getattr(module, target), None
        value = weight.get_value()
        if float8.scaling == "tensor":
            largest = jnp.max(jnp.abs(jax.lax.stop_gradient(value)), axis=range(1, value.ndim))
            scale = float8_scale(pmax(largest, ("fsdp", "tensor")))
        setattr(module, target, weight.replace(Float8Weight(value, scale, float8)))
    return blocks


def fold_in(keys_BT: jax.Array | None, number: Any, *, word: int = 0) -> jax.Array | None:
    """Make other keys for each number (layers in word 0, inputs in word 1); no keys stay none.

    By exclusive or: the keys are random already, and the generator mixes them with each counter.
    `jax.random.fold_in` would run the generator once more for each mask.
    """
    if keys_BT is None:
        return None
    data = jax.random.key_data(keys_BT)  # (B, T, words)
    here = jnp.arange(data.shape[-1]) == word
    folded = data ^ jnp.where(here, jnp.uint32(number), jnp.uint32(0)).reshape(1, 1, -1)
    return jax.random.wrap_key_data(folded)


def init_adapters(config: ModelConfig, lora: LoraConfig, key: jax.Array) -> Adapters:
    """Return new adapters of every target, stacked over layers."""
    keys = jax.random.split(named_key(key, "lora"), config.num_layers)

    def stack(target: str) -> Adapter:
        return jax.vmap(lambda k: Adapter(config, lora, target, k))(keys)

    return {target: stack(target) for target in lora.targets}


def attach(model: Any, adapters: Adapters | None) -> Any:
    """Copy `model`, sharing its arrays, with `adapters` beside the weights that they adapt."""
    model = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model))
    for target, adapter in (adapters or {}).items():
        setattr(getattr(model.blocks, MODULES[target]), f"{target}_lora", adapter)
    return model


def detach(model: Any) -> tuple[Any, Adapters | None]:
    """Return the model without adapters, and the adapters: invert `attach`."""
    model, adapters = attach(model, None), {}
    for target, module in MODULES.items():
        block = getattr(model.blocks, module)
        if (adapter := getattr(block, f"{target}_lora")) is not None:
            adapters[target] = adapter
            setattr(block, f"{target}_lora", None)
    return model, adapters or None


def trainable(model: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return what of a model is trained (its adapters, or all), and the way back to a model."""
    base, adapters = detach(model)
    if adapters is None:
        return base, lambda weights: weights
    return adapters, lambda weights: attach(base, weights)


def drops_out(adapters: Adapters | None) -> bool:
    """Return whether training needs `dropout_keys` in its batches."""
    return any(adapter.dropout for adapter in (adapters or {}).values())


def merge(model: Any, *, dtype: jnp.dtype) -> Any:
    """Add the adapters into their matrices in exact float32, and cast these to `dtype`."""
    base, adapters = detach(model)
    for target, adapter in (adapters or {}).items():
        block = getattr(base.blocks, MODULES[target])
        weight, a, b = getattr(block, target), adapter.a[...], adapter.b[...]
        dims = (((a.ndim - 1,), (1,)), ((0,), (0,)))  # (L, in, R) x (L, R, out)
        product = jax.lax.dot_general(
            a, b, dims, precision="highest", preferred_element_type=jnp.float32
        )
        value = weight[...].astype(jnp.float32) + adapter.scale * product
        setattr(block, target, weight.replace(value.astype(dtype)))
    return base


def num_adapter_parameters(config: ModelConfig, lora: LoraConfig) -> int:
    """Return the number of weights of the adapters in all layers."""
    sides = [letters for target in lora.targets for letters in LORA_TARGETS[target]]
    widths = sum(math.prod(config.dims[letter] for letter in letters) for letters in sides)
    return config.num_layers * lora.rank * widths
