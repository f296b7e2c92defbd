"""Moments kept in fewer bits between updates, rounded stochastically."""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from llamajax.sharding import is_stacked, is_weight, map_weights

_BITS = 16  # that bfloat16 leaves out of a float32


def with_bfloat16_moments(
    inner: optax.GradientTransformation, seed: int, layers: np.ndarray | None
) -> optax.GradientTransformationExtraArgs:
    """Keep all weights in the state of `inner` (its moments) in bfloat16; it computes in float32.

    A moment changes by less than bfloat16 resolves. Rounded up or down with the right probability,
    it is right on average. The random bits are a function of seed, step, name and place in the
    stored weight: the same on every mesh. layers: the number of each stacked layer, None: 0, 1, ...
    """

    def init(weights: Any) -> Any:
        return _cast(inner.init(weights), jnp.bfloat16)

    def update(grads: Any, state: Any, weights: Any = None, *, step: jax.Array) -> tuple[Any, Any]:
        updates, new = inner.update(grads, _cast(state, jnp.float32), weights)
        key = jax.random.fold_in(jax.random.key(seed), step)

        def rounded(path: Any, leaf: Any) -> Any:
            if not is_weight(leaf):
                return leaf
            name = zlib.crc32(jax.tree_util.keystr(path).encode()) & 0x7FFFFFFF
            words = jax.random.key_data(jax.random.fold_in(key, name))
            bits = _random_bits(words, leaf, layers)
            return leaf.replace(round_stochastically(leaf.get_value(), bits))

        return updates, jax.tree_util.tree_map_with_path(rounded, new, is_leaf=is_weight)

    return optax.GradientTransformationExtraArgs(init, update)


def round_stochastically(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Round float32 to bfloat16: up with the probability of what is left out.

    bits: uint32 of `x`'s shape, of which the low 16 are random.
    """
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32)
    added = pattern + (bits & jnp.uint32((1 << _BITS) - 1))
    high = jax.lax.bitcast_convert_type((added >> _BITS).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), high, x.astype(jnp.bfloat16))


def _random_bits(words: jax.Array, weight: nnx.Variable, layers: np.ndarray | None) -> jax.Array:
    """Return uint32 of the weight's shape, a hash of two key words, layer and place in the layer.

    Elementwise, so that it takes no memory and each device computes its own part.
    """
    shape, first = weight.get_value().shape, int(is_stacked(weight))
    place = jnp.uint32(0)
    for dim in range(first, len(shape)):
        stride = jnp.uint32(math.prod(shape[dim + 1 :]) % 2**32)
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * stride
    if first:
        numbers = np.arange(shape[0]) if layers is None else layers
        number = jnp.asarray(numbers, jnp.uint32).reshape(-1, *[1] * (len(shape) - 1))
        words = [_mixed(word + number) for word in words]
    return _mixed(_mixed(place ^ words[0]) + words[1])


def _mixed(x: jax.Array) -> jax.Array:
    """Mix the bits of uint32 values: the finalizer of MurmurHash3 (Appleby, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _cast(state: Any, dtype: Any) -> Any:
    return map_weights(
        lambda w: w.replace(w.get_value().astype(dtype)) if is_weight(w) else w, state
    )
