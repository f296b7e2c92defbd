"""Products in 8 bits against a float64 model of the same rounding, and steps that use them."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import stepping

from llamajax.config.schema import LORA_TARGETS
from llamajax.models.remat import REMAT
from llamajax.ops.linear import float8_scale, linear, quantize
from llamajax.sharding.collectives import cast_and_gather
from llamajax.sharding.float8 import Float8, Float8Weight

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
OPTIONS = Float8(targets=tuple(LORA_TARGETS), gradients="e5m2", scaling="tensor")
M, C, N = 40, 24, 56


def rounded(x, dtype, axis=None):
    """`x` rounded to 8 bits with scales by the definition: the largest power of two that fits."""
    largest = np.max(np.abs(x), axis=axis, keepdims=axis is not None)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(float(ml_dtypes.finfo(dtype).max) / largest))
    scale = np.exp2(np.clip(exponent, -60, 60))
    return (x * scale).astype(dtype).astype(np.float64) / scale


def drawn(outlier=False):
    rng = np.random.default_rng(5)
    x, grad = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((M, C), (M, N)))
    w = rng.standard_normal((C, N)).astype(np.float32) * 0.02
    if outlier:
        x[3, 4], grad[7, 8], w[5, 6] = 3000.0, 1e5, 40.0
        x[:, 9], grad[11], w[:, 2] = 0.0, 0.0, 0.0
    return x, w, grad


def products(options, x, w, grad):
    """The product of `x` and a stored `w`, and the gradients of both for `grad` behind it."""

    def multiply(x, w):
        scale = float8_scale(jnp.max(jnp.abs(w))) if options.scaling == "tensor" else None
        weight = Float8Weight(w, scale, options)
        return linear(x, cast_and_gather(weight, "DF", x.dtype, split_tokens=False))

    y, pull = jax.vjp(multiply, jnp.asarray(x), jnp.asarray(w))
    return y, *pull(jnp.asarray(grad))


@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("scaling", ["tensor", "row"])
@pytest.mark.parametrize("gradients", ["e5m2", "e4m3", "bfloat16"])
def test_all_three_products_are_those_of_rounded_operands_in_float64(gradients, scaling, outlier):
    x, w, grad = drawn(outlier)
    options = dataclasses.replace(OPTIONS, gradients=gradients, scaling=scaling)
    found = products(options, x, w, grad)
    assert [a.dtype.name for a in found] == ["bfloat16", "bfloat16", "float32"]
    # of an operand in rows, the dim that its product sums over
    by_rows, wide = scaling == "row", np.float64
    first, second = (0, 1) if by_rows else (None, None)
    x, g = x.astype(wide), grad.astype(wide)
    wb = w.astype(ml_dtypes.bfloat16).astype(wide) if by_rows else w.astype(wide)
    x8, w8 = rounded(x, E4M3, second), rounded(wb, E4M3, first)
    if gradients == "bfloat16":
        wanted = x8 @ w8, g @ w8.T, x8.T @ g
    else:
        kind = E5M2 if gradients == "e5m2" else E4M3
        grad_x = rounded(g, kind, second) @ rounded(wb, E4M3, second).T
        wanted = x8 @ w8, grad_x, rounded(x, E4M3, first).T @ rounded(g, kind, first)
    for ours, theirs, name in zip(found, wanted, ("y", "grad_x", "grad_w"), strict=True):
        scale = np.max(np.abs(theirs))
        # half a unit of bfloat16, and sums of at most 56 terms in float32
        limit = 1e-6 if name == "grad_w" else 2.0**-8
        error = np.abs(np.asarray(ours).astype(wide) - theirs) / (np.abs(theirs) + 1e-3 * scale)
        assert np.max(error) < limit, name


def test_scales_are_powers_of_two_that_fit_as_tightly_as_they_can():
    largest = np.float32([1.0, 448, 449, 3e-5, 1e20, 1e-30, 0.0])
    scales = np.asarray(float8_scale(jnp.asarray(largest)))
    np.testing.assert_array_equal(np.exp2(np.round(np.log2(scales))), scales)
    assert np.all(largest * scales <= 448)
    assert np.all(largest[:4] * scales[:4] > 224)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_is_not_cut_off(bad):
    assert np.isnan(float8_scale(jnp.float32(bad)))
    x, w, grad = drawn()
    x[2, 3] = bad
    assert not np.isfinite(np.asarray(products(OPTIONS, x, w, grad)[0][2], np.float32)).any()
    assert np.all(np.asarray(quantize(jnp.zeros((3, 5), jnp.bfloat16), E4M3)[0], np.float32) == 0)


def test_rounding_twice_is_rounding_once():
    """A gathered weight is rounded where it was stored and cast again by its product."""
    w = jnp.asarray(drawn(True)[1])
    values, inverse = quantize(w, E4M3)
    once = values.astype(jnp.float32) * inverse
    values, inverse = quantize(once, E4M3)
    np.testing.assert_array_equal(values.astype(jnp.float32) * inverse, once)


@pytest.mark.parametrize("policy", ["dots", "none", "full"])
def test_policies_of_recomputation_change_no_bit(policy):
    """XLA for CPUs makes NaN of operands in e4m3 that a scan keeps; they are kept as uint8."""
    w = jnp.asarray(np.random.default_rng(7).standard_normal((3, 16, 16)), jnp.float32)

    def loss(w, policy):
        scales = float8_scale(jnp.max(jnp.abs(jax.lax.stop_gradient(w)), axis=(1, 2)))

        def body(x, layer):
            weight = Float8Weight(*layer, OPTIONS)
            return linear(x, cast_and_gather(weight, "DF", x.dtype, split_tokens=False)), None

        if policy:
            body = jax.checkpoint(body, policy=REMAT[policy], prevent_cse=False)
        x = jnp.ones((8, 16), jnp.bfloat16)
        return jnp.sum(jax.lax.scan(body, x, (w, scales))[0].astype(jnp.float32) ** 2)

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, grad = gradient(w, policy)
    assert np.isfinite(value)
    plain, plain_grad = jax.value_and_grad(loss)(w, None)
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    np.testing.assert_allclose(grad, plain_grad, rtol=0, atol=1e-5 * np.abs(plain_grad).max())


@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_a_layer_keeps_the_layout_of_the_stack_that_it_comes_from(scaling):
    """Else XLA for GPUs transposes the whole stack, in float32: test_absent_devices.py measures."""
    options = dataclasses.replace(OPTIONS, scaling=scaling)

    def loss(w):
        def body(x, layer):
            scale = float8_scale(jnp.max(jnp.abs(layer))) if scaling == "tensor" else None
            weight = Float8Weight(layer, scale, options)
            return linear(x, cast_and_gather(weight, "DF", x.dtype, split_tokens=False)), None

        return jnp.sum(jax.lax.scan(body, jnp.ones((8, 16), jnp.bfloat16), w)[0])

    text = jax.jit(loss).lower(jnp.ones((3, 16, 16))).as_text()
    fixed = [line for line in text.splitlines() if "@LayoutConstraint" in line]
    assert len(fixed) == 1
    assert "result_layouts = [dense<[1, 0]> : tensor<2xindex>]" in fixed[0]
    assert "-> tensor<16x16xf32>" in fixed[0]


MESHES = [
    ({"data": 2, "fsdp": 2, "tensor": 2}, {}),
    ({"stage": 2, "fsdp": 2}, {"layers": 3}),
    ({"stage": 2, "tensor": 2}, {"layers": 3, "accumulation": 1, "remat": "none"}),
    ({"fsdp": 2, "sequence": 2}, {"accumulation": 1}),
]


@pytest.mark.parametrize(
    ("axes", "options"),
    [MESHES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in MESHES[1:])],
    ids=str,
)
def test_sharded_steps_are_those_of_one_device(axes, options):
    """Activations in float32: in bfloat16 more values are rounded the other way.

    A sum in another order can be, so that a few of 8 bits differ by 6 %. The first loss is the same
    to float32; with a scale of each device's own it would be too, but its gradient would not.
    """
    layers = {"layers": options.pop("layers", 2)}
    common = {"float8": OPTIONS, "steps": 2, **layers}
    found = stepping.run(*axes.items(), **({"accumulation": 2} | common | options))
    expected = stepping.run(**common)
    for name, first, later in (("loss", 1e-6, 1e-3), ("grad_norm", 1e-4, 3e-2)):
        ours, theirs = ([row[name] for row in rows] for rows, *_ in (found, expected))
        assert ours[0] == pytest.approx(theirs[0], rel=first), name
        assert ours[1] == pytest.approx(theirs[1], rel=later), name
