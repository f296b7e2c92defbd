"""Matrix products over the last dims of an activation, done on two-dimensional operands."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llamajax.sharding.collectives import pcast_varying_like


def linear(x: jax.Array, w: jax.Array, *, contract: int = 1) -> jax.Array:
    """Multiply `x` (..., C) by `w` (C, ...) over the last/first `contract` dims; dtype of `x`.

    Both operands are flattened to matrices first, so that the product and its two backward products
    are plain matrix products. On a CPU this alone makes a feed-forward layer 1.4 times as fast as
    three-dimensional einsums. Where `w` is float32 and `x` is not, `w` is rounded for the product,
    and its gradient leaves the backward product in float32. A remat policy does not see the product
    inside this derivative: its result has the name "product".
    """
    free, inner = x.shape[: x.ndim - contract], x.shape[x.ndim - contract :]
    assert inner == w.shape[:contract], (x.shape, w.shape)
    out = w.shape[contract:]
    x_2d = x.reshape(math.prod(free), math.prod(inner))
    w_2d = w.reshape(math.prod(inner), math.prod(out))
    if w.dtype == x.dtype:
        y_2d = jnp.dot(x_2d, w_2d, preferred_element_type=x.dtype)
    else:
        y_2d = _mixed(pcast_varying_like(x_2d, w_2d), pcast_varying_like(w_2d, x_2d))
        y_2d = checkpoint_name(y_2d, "product")
    return y_2d.reshape(*free, *out)


@jax.custom_vjp
def _mixed(x: jax.Array, w: jax.Array) -> jax.Array:
    """The product of `x` (M, C) and float32 `w` (C, N), in the dtype of `x`."""
    return jnp.dot(x, w.astype(x.dtype), preferred_element_type=x.dtype)


def _mixed_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array):
    x, w = saved
    grad_x = jnp.dot(grad, w.astype(x.dtype).T, preferred_element_type=x.dtype)
    return grad_x, jnp.dot(x.T, grad, preferred_element_type=jnp.float32)


_mixed.defvjp(lambda x, w: (_mixed(x, w), (x, w)), _mixed_backward)
