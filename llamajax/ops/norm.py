"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467)."""

import jax
import jax.numpy as jnp


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, *, eps: float) -> jax.Array:
    """Divide `x` by its root mean square, times `scale`, in float32; dtype of `x`."""
    x = x_BTD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    scale = scale_D.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale_D.shape)
    return (x * scale).astype(x_BTD.dtype)
