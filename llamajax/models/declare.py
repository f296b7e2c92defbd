"""Declaration of weights: dimension letters and initial values, in one place."""

import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from llamajax.config.schema import ModelConfig


def named_key(key: jax.Array, name: str) -> jax.Array:
    """Return the key of the part `name`; it depends neither on other parts nor on their order."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def normal(config: ModelConfig, axes: str, key: jax.Array, name: str) -> nnx.Param:
    """Return a float32 matrix of dims `axes`, drawn with standard deviation `config.init_std`.

    A function of the key and the published sizes alone, on every mesh (partitionable threefry).
    Rows that pad the vocabulary are zero.
    """
    shape = tuple(config.dims[d] for d in axes)
    value = config.init_std * jax.random.normal(named_key(key, name), shape, jnp.float32)
    if axes[0] == "V" and config.padded_vocab_size != config.vocab_size:
        row = jnp.arange(shape[0]).reshape(-1, *([1] * (len(shape) - 1)))
        value = jnp.where(row < config.vocab_size, value, 0.0)
    return nnx.Param(value, axes=axes)


def ones(config: ModelConfig, axes: str) -> nnx.Param:
    """Return a float32 scale of ones."""
    return nnx.Param(jnp.ones(tuple(config.dims[d] for d in axes), jnp.float32), axes=axes)
