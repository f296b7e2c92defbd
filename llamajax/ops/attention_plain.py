"""Attention in its plainest form, with the whole score matrix, under any mask."""

import jax
import jax.numpy as jnp


def plain_attention(
    q_BTNH: jax.Array, k: jax.Array, v: jax.Array, allowed_BTS: jax.Array, *, keys: str
) -> jax.Array:
    """Attend from each query to the keys that it may see, (B, T, N, H), dtype of q.

    keys: the dimensions of k and v, "BSKH", or "BKSH" for a cache: its products are then batched
    matrix products over the cache as it is stored (on a CPU six times as fast as with S first).
    N is a multiple of K and query head n uses kv head n // (N / K). Scores are scaled by H**-0.5,
    the softmax is float32. Every query sees at least one key.
    """
    B, T, N, H = q_BTNH.shape
    K = k.shape[keys.index("K")]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    s_BKGTS = jnp.einsum(f"BTKGH,{keys}->BKGTS", q_BTKGH, k, preferred_element_type=jnp.float32)
    s_BKGTS = jnp.where(allowed_BTS[:, None, None], s_BKGTS * H**-0.5, -jnp.inf)
    p_BKGTS = jax.nn.softmax(s_BKGTS, axis=-1).astype(v.dtype)
    o_BTKGH = jnp.einsum(f"BKGTS,{keys}->BTKGH", p_BKGTS, v, preferred_element_type=q_BTNH.dtype)
    return o_BTKGH.reshape(q_BTNH.shape)
