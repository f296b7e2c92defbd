"""Gradients of weights are summed in float32 as they leave their product, not rounded before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax.models.remat import REMAT
from llamajax.ops.linear import linear
from llamajax.sharding.collectives import cast_and_gather


def summed_gradient(x_MTC, w_CN, grad_MTN, *, dtype):
    """Sum the gradient of `w` over M microbatches as a step does."""

    def add(total, microbatch):
        x, grad = microbatch

        def loss(w):
            whole = cast_and_gather(w, "DF", dtype, split_tokens=False)
            return jnp.sum(linear(x, whole).astype(jnp.float32) * grad.astype(jnp.float32))

        return total + jax.grad(loss)(w_CN), None

    return jax.jit(lambda *xs: jax.lax.scan(add, jnp.zeros_like(w_CN), xs)[0])(x_MTC, grad_MTN)


def test_the_sum_over_64_microbatches_is_that_of_float64():
    rng, dtype = np.random.default_rng(3), jnp.bfloat16
    x_MTC = jnp.asarray(rng.standard_normal((64, 40, 24)), dtype)
    grad_MTN = jnp.asarray(rng.standard_normal((64, 40, 56)), dtype)
    w_CN = jnp.asarray(rng.standard_normal((24, 56)), jnp.float32)
    exact = np.einsum("mtc,mtn->cn", *(np.asarray(a, np.float64) for a in (x_MTC, grad_MTN)))
    found = np.asarray(summed_gradient(x_MTC, w_CN, grad_MTN, dtype=dtype))
    # float32 sums of 2,560 terms: 5e-7; products rounded to bfloat16 before the sum: 2e-3
    assert np.linalg.norm(found - exact) < 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_values_and_the_gradient_of_x_are_those_of_a_product_in_the_dtype_of_x(dtype):
    rng = np.random.default_rng(5)
    x, grad = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((3, 7, 2, 4), (3, 7, 5)))
    w = jnp.asarray(rng.standard_normal((2, 4, 5)), jnp.float32).astype(dtype)
    want, pull = jax.vjp(lambda x: linear(x, w, contract=2), x)
    found, pull_mixed = jax.vjp(lambda x: linear(x, w.astype(jnp.float32), contract=2), x)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(pull_mixed(grad)[0], pull(grad)[0])


@pytest.mark.parametrize("policy", ["dots", "none", "full"])
def test_remat_keeps_the_product_of_a_float32_weight_as_any_other(policy):
    x = jnp.ones((8, 16), jnp.bfloat16)
    pair = [jnp.ones((16, 16), jnp.float32)] * 2

    def loss(pair, x, *, cast):
        body = jax.checkpoint(
            lambda w, x: linear(jax.nn.silu(linear(x, cast(w[0]))), cast(w[1])),
            policy=REMAT[policy],
            prevent_cse=False,
        )
        return jnp.sum(jax.nn.silu(body(pair, x)).astype(jnp.float32))

    def products(cast):
        program = jax.jit(jax.grad(lambda *a: loss(*a, cast=cast), argnums=(0, 1)))
        return program.lower(pair, x).as_text().count("stablehlo.dot_general")

    assert products(lambda w: w) == products(lambda w: w.astype(jnp.bfloat16))
