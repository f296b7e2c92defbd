"""Shapes, dtypes and shardings of a model, without any array."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from llamajax.config.schema import ModelConfig
from llamajax.models.llama import Llama
from llamajax.sharding import map_weights, shardings


def abstract_model(config: ModelConfig, mesh: Mesh, *, dtype: jnp.dtype = jnp.float32) -> Llama:
    """Return a Llama of `jax.ShapeDtypeStruct`, sharded as weights are stored on `mesh`.

    Matrices have `dtype`; norm scales stay float32 (rounded to bfloat16, 1.003 would be 1).
    """
    shapes = jax.eval_shape(lambda key: Llama(config, key), jax.random.key(0))

    def abstract(weight: nnx.Variable, sharding: nnx.Variable) -> nnx.Variable:
        kind = jnp.dtype(dtype) if len(weight.axes) > 1 else jnp.dtype("float32")
        shape = weight.get_value().shape
        return weight.replace(jax.ShapeDtypeStruct(shape, kind, sharding=sharding.get_value()))

    return map_weights(abstract, shapes, shardings(shapes, mesh))
