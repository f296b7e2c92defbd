"""Attention of new tokens over a cache of keys and values."""

import jax
import jax.numpy as jnp


def cached_attention(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, allowed_BS: jax.Array
) -> jax.Array:
    """Attend from each query to the slots that its row may see, (B, T, N, H), dtype of q.

    N is a multiple of K and query head n uses kv head n // (N / K). Scores are scaled by H**-0.5,
    the softmax is float32. Every row sees at least one slot. Kv heads come before slots, so that
    both products are batched matrix products over the cache as it is stored (on a CPU six times as
    fast as with slots first).
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    s_BKGTS = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32)
    s_BKGTS = jnp.where(allowed_BS[:, None, None, None, :], s_BKGTS * H**-0.5, -jnp.inf)
    p_BKGTS = jax.nn.softmax(s_BKGTS, axis=-1).astype(v_BKSH.dtype)
    o_BTKGH = jnp.einsum("BKGTS,BKSH->BTKGH", p_BKGTS, v_BKSH, preferred_element_type=q_BTNH.dtype)
    return o_BTKGH.reshape(q_BTNH.shape)
