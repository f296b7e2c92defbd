"""The look-up in a table split over vocabulary and width, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llamajax import sharding
from llamajax.config.schema import MeshConfig
from llamajax.ops.embedding import embed
from llamajax.sharding import ACTIVATIONS, WEIGHTS
from llamajax.sharding.collectives import pcast_varying, psum

B, T, D, VOCAB, ROWS = 8, 5, 6, 300, 384  # stored in a multiple of 128; 300 is none of 128 x 2
MESHES = [
    {},
    {"fsdp": 2},
    {"tensor": 2},
    {"fsdp": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
]


def inputs():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(ROWS, D)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
    tokens[0, :3] = 0, 191, VOCAB - 1  # the edges of the parts
    tokens[:, 4] = 192  # on every device, several times
    return table, tokens, rng.normal(size=(B, T, D)).astype(np.float32)


def on_mesh(shape: dict[str, int], table, tokens, grad, dtype: str, *, check_vma: bool = True):
    """Embeddings of all tokens, and the table's gradient where theirs is `grad`."""
    count = np.prod(list(shape.values()), dtype=int)
    mesh = sharding.build_mesh(MeshConfig(**shape), jax.devices()[:count])
    spec = functools.partial(sharding.spec, mesh=mesh)
    weights, rows = spec("VD", WEIGHTS), spec("BTD", ACTIVATIONS)

    def local(table, tokens, grad):
        look_up = lambda table: embed(table, tokens, jnp.dtype(dtype))  # noqa: E731
        x, backward = jax.vjp(look_up, pcast_varying(table, "data"))
        return x, psum(backward(grad.astype(dtype))[0], "data")

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(weights, spec("BT", ACTIVATIONS), rows),
        out_specs=(rows, weights),
        check_vma=check_vma,
    )
    specs = (weights, spec("BT", ACTIVATIONS), rows)
    placed = [
        jax.device_put(array, NamedSharding(mesh, s))
        for array, s in zip((table, tokens, grad), specs, strict=True)
    ]
    return [np.asarray(array) for array in jax.jit(run)(*placed)]


def assert_equal(found, table, tokens, grad):
    x, grad_table = found
    np.testing.assert_array_equal(x, table[tokens])
    expected = np.zeros(table.shape, np.float64)
    np.add.at(expected, tokens, grad.astype(np.float64))
    np.testing.assert_allclose(grad_table, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert not grad_table[VOCAB:].any(), "padding has no gradient"


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_value_and_gradient_equal_numpy(shape):
    assert_equal(on_mesh(shape, *inputs(), "float32"), *inputs())


def test_the_same_without_the_check_of_varying_axes():
    assert_equal(on_mesh(MESHES[-1], *inputs(), "float32", check_vma=False), *inputs())


@pytest.mark.parametrize("shape", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_gradients_of_a_frequent_token_are_summed_in_float32(shape):
    """2,400 times 1/256 in bfloat16 would stop growing at 1."""
    table, tokens = inputs()[0], np.full((B, 300), 192, np.int32)
    grad = np.full((B, 300, D), 1 / 256, np.float32)
    x, grad_table = on_mesh(shape, table, tokens, grad, "bfloat16")
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x, table.astype(jnp.bfloat16)[tokens])
    np.testing.assert_allclose(grad_table[192], B * 300 / 256, rtol=1e-6)
