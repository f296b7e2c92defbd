"""The look-up in a table split over vocabulary and width, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import on_mesh

from llamajax.ops.embedding import embed
from llamajax.sharding.collectives import pcast_varying, psum

B, T, D, VOCAB, ROWS = 8, 5, 6, 300, 384  # stored in a multiple of 128; 300 is none of 128 x 2
ALL_AXES = {"data": 2, "fsdp": 2, "tensor": 2}
MESHES = [{}, {"fsdp": 2}, {"tensor": 2}, {"fsdp": 2, "tensor": 2}, ALL_AXES]


def inputs():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(ROWS, D)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
    tokens[0, :3] = 0, 191, VOCAB - 1  # the edges of the parts
    tokens[:, 4] = 192  # on every device, several times
    return table, tokens, rng.normal(size=(B, T, D)).astype(np.float32)


def run(sizes: dict[str, int], table, tokens, grad, dtype: str, *, check_vma: bool = True):
    """Embeddings of all tokens, and the table's gradient where theirs is `grad`."""

    def local(table, tokens, grad):
        table = pcast_varying(table, "data")
        x, backward = jax.vjp(lambda table: embed(table, tokens, jnp.dtype(dtype)), table)
        return x, psum(backward(grad.astype(dtype))[0], "data")

    arrays = (("VD", table), ("BT", tokens), ("BTD", grad))
    return on_mesh(sizes, local, arrays, ("BTD", "VD"), check_vma=check_vma)


@pytest.mark.parametrize(
    ("sizes", "check_vma"), [*((sizes, True) for sizes in MESHES), (ALL_AXES, False)], ids=str
)
def test_value_and_gradient_equal_numpy(sizes, check_vma):
    table, tokens, grad = inputs()
    x, grad_table = run(sizes, table, tokens, grad, "float32", check_vma=check_vma)
    np.testing.assert_array_equal(x, table[tokens])
    expected = np.zeros(table.shape, np.float64)
    np.add.at(expected, tokens, grad.astype(np.float64))
    np.testing.assert_allclose(grad_table, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert not grad_table[VOCAB:].any(), "padding has no gradient"


@pytest.mark.parametrize("sizes", [{}, ALL_AXES], ids=str)
def test_gradients_of_a_frequent_token_are_summed_in_float32(sizes):
    """2,400 times 1/256 in bfloat16 would stop growing at 1."""
    table, tokens = inputs()[0], np.full((B, 300), 192, np.int32)
    grad = np.full((B, 300, D), 1 / 256, np.float32)
    x, grad_table = run(sizes, table, tokens, grad, "bfloat16")
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x, table.astype(jnp.bfloat16)[tokens])
    np.testing.assert_allclose(grad_table[192], B * 300 / 256, rtol=1e-6)
