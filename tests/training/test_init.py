"""The same seed gives the same weights on every mesh, bit for bit."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stepping
from flax import nnx
from meshes import mesh_of
from tiny_model import named_arrays, tiny_model

from llamajax import optim, sharding
from llamajax.backends.platforms import exact_options
from llamajax.models.declare import normal, ones
from llamajax.training.state import StateSpec

# The vocabulary is stored in 128 rows: some parts have padding and some have none.
MODEL = tiny_model(num_heads=8, num_kv_heads=8, head_size=6, tie_embeddings=True, init_std=0.2)
SIZES = (1, 2, 4, 8)
SHAPES = [shape for shape in itertools.product(SIZES, repeat=3) if np.prod(shape) == 8]


class EveryKind(nnx.Module):
    """One weight of each way to be split: a whole model's program takes ten times as long."""

    def __init__(self, key: jax.Array):
        self.table = normal(MODEL, "VD", key, "table")
        self.norm = ones(MODEL, "D")
        keys = jax.random.split(key, MODEL.num_layers)
        self.stacked = jax.vmap(lambda k: normal(MODEL, "DNH", k, "query"))(keys)


def mesh(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return mesh_of(data=data, fsdp=fsdp, tensor=tensor)


@functools.cache
def initialized(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    abstract = jax.eval_shape(EveryKind, jax.random.key(0))
    placed = sharding.shardings(abstract, mesh(*shape))
    options = exact_options(jax.default_backend())
    init = jax.jit(EveryKind, out_shardings=placed, compiler_options=options)
    return named_arrays(init(jax.random.key(5)))


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_mesh_draws_the_weights_of_one_device(shape):
    assert_same_bits(initialized(shape), initialized((1, 1, 1)))


def test_weights_differ_from_each_other_and_padding_is_zero():
    found = initialized((1, 1, 1))
    table = next(value for name, value in found.items() if "table" in name)
    assert not table[MODEL.vocab_size :].any()
    assert table[: MODEL.vocab_size].std() == pytest.approx(MODEL.init_std, rel=0.1)
    layers = next(value for name, value in found.items() if "stacked" in name)
    assert not np.any(layers[0] == layers[1])


def test_a_whole_state_is_the_same_on_one_device_and_on_eight():
    optimizer = optim.build(stepping.OPTIM, steps=10)
    meshes = (mesh(1, 1, 1), mesh(2, 2, 2))
    states = [StateSpec(model=MODEL, optimizer=optimizer, mesh=m).init(3) for m in meshes]
    assert_same_bits(named_arrays(states[1]), named_arrays(states[0]))
    assert states[1].step.dtype == jnp.int32
    weights = jax.tree.leaves(states[1].model)
    assert all(x.addressable_shards[0].data.size <= x.size // 2 for x in weights), "born in shards"
