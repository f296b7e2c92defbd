"""The state of a run: what a step takes and returns, and all that a checkpoint must hold."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from llamajax.config.schema import ModelConfig
from llamajax.models.llama import Llama
from llamajax.sharding import shardings


@struct.dataclass
class TrainState:
    """Step n means n updates applied."""

    step: jax.Array  # int32 scalar
    model: Llama  # float32 master weights
    opt_state: optax.OptState


def _fresh(key: jax.Array, config: ModelConfig, optimizer: optax.GradientTransformation):
    model = Llama(config, key)
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimizer.init(model)
    return TrainState(step=jnp.int32(0), model=model, opt_state=opt_state)


def abstract_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the whole state; nothing is allocated."""
    shapes = jax.eval_shape(lambda key: _fresh(key, config, optimizer), jax.random.key(0))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings(shapes, mesh),
    )


def init_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, *, seed: int
) -> TrainState:
    """Random initial state, born sharded. The same seed gives the same weights on every mesh."""
    placed = jax.tree.map(lambda x: x.sharding, abstract_state(config, optimizer, mesh))
    init: Any = jax.jit(lambda key: _fresh(key, config, optimizer), out_shardings=placed)
    return init(jax.random.key(seed))
