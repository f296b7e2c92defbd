"""Dropout whose mask depends on token and feature alone, not on the mesh."""

import jax
import jax.numpy as jnp

from llamajax.sharding import collectives


def dropout(x: jax.Array, keys_BT: jax.Array, *, rate: float, split: bool) -> jax.Array:
    """Zero features of `x` (B, T, ...) with probability `rate`; divide the rest by 1 - rate.

    `keys_BT` are typed keys, one a token, the same for a token on every mesh. `split`: whether the
    first feature dim is this device's part along `tensor`; the mask is then drawn for all parts and
    cut, so that it does not depend on their number.
    """
    here, *rest = x.shape[2:]
    parts = collectives.axis_size("tensor") if split else 1

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, 1.0 - rate, (parts * here, *rest))

    keep = jax.vmap(jax.vmap(draw))(keys_BT)
    if parts > 1:
        keep = jax.lax.dynamic_slice_in_dim(
            keep, collectives.axis_index("tensor") * here, here, axis=2
        )
    return jnp.where(keep, x * (1.0 / (1.0 - rate)), jnp.zeros((), x.dtype))
