"""A model's shapes, dtypes and shardings, before any of it exists."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from llamajax.config.schema import ModelConfig
from llamajax.models.llama import Llama
from llamajax.sharding import map_weights, shardings


def abstract_model(config: ModelConfig, mesh: Mesh, *, dtype: jnp.dtype = jnp.float32) -> Llama:
    """A Llama of `jax.ShapeDtypeStruct`, sharded as weights are stored on `mesh`.

    Matrices have `dtype`; norm scales stay float32 (rounded to bfloat16, 1.003 would be 1).
    """
    shapes = jax.eval_shape(lambda key: Llama(config, key), jax.random.key(0))

    def one(weight: nnx.Variable, placed: nnx.Variable) -> nnx.Variable:
        kind = jnp.dtype(dtype) if len(weight.axes) > 1 else jnp.dtype("float32")
        shape, sharding = weight.get_value().shape, placed.get_value()
        return weight.replace(jax.ShapeDtypeStruct(shape, kind, sharding=sharding))

    return map_weights(one, shapes, shardings(shapes, mesh))
