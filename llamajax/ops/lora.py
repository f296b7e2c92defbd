"""The one formula of an adapter merged into its matrix."""

import jax
import jax.numpy as jnp


def merged(
    w: jax.Array, a: jax.Array, b: jax.Array, *, scale: float, dtype: jnp.dtype
) -> jax.Array:
    """`w` (L, in, out) + scale * `a` (L, in, R) `b` (L, R, out), in float32 and then in `dtype`.

    `in` and `out` are one or several dims. The product is exact float32 on every backend.
    """
    numbers = (((a.ndim - 1,), (1,)), ((0,), (0,)))
    added = jax.lax.dot_general(
        a, b, numbers, precision="highest", preferred_element_type=jnp.float32
    )
    return (w.astype(jnp.float32) + scale * added).astype(dtype)
