"""Causal self-attention over packed documents: one function, several implementations.

- `xla`: the readable reference; holds the whole T x S matrix. Any platform.
- `blocked`: linear memory, plain XLA operations; the fast one on a CPU and wherever no fused kernel
  exists. Any platform.
- `cudnn`: NVIDIA's fused kernel, with the documents given as offsets (`attention_kernels.py`).
- `splash`: the Pallas kernel for TPUs, with segment ids (`attention_kernels.py`).

All of them see local arrays: they work the same outside and inside `jax.shard_map`, where batch and
heads may be split, and communicate nothing. The output (and the fused kernels' row statistics) is
tagged "attention" with `jax.ad_checkpoint.checkpoint_name`: under `jax.checkpoint` with
`save_only_these_names("attention")` the backward pass finds both and does not run the forward
kernel again; q, k and v alone are recomputed.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llamajax.ops.attention_blocked import blocked_attention
from llamajax.sharding import collectives

SUPPORTED = ("xla", "blocked", "cudnn", "splash")


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    impl: str,
    segment_ids_BT: jax.Array | None,
) -> jax.Array:
    """Causal attention of each query over the earlier keys of its own document, (B, T, N, H).

    T equals S; N is a multiple of K and query head n uses kv head n // (N / K). Scores are scaled
    by H**-0.5, the softmax is float32, the output has the dtype of q. `segment_ids` (int32) numbers
    the documents packed in a row, each of them contiguous; 0 is padding, which attends to itself
    only and so stays finite. Without segment ids a row is one document.
    """
    assert q_BTNH.shape[1] == k_BSKH.shape[1], "self-attention: as many queries as keys"
    assert q_BTNH.shape[2] % k_BSKH.shape[2] == 0, (q_BTNH.shape, k_BSKH.shape)
    # one type for all inside shard_map; where k is the same on several devices of an axis and q is
    # not, the derivative of this cast sums dk over that axis
    arrays = [x for x in (q_BTNH, k_BSKH, v_BSKH, segment_ids_BT) if x is not None]
    arrays = [collectives.varying_like(x, *arrays) for x in arrays]
    q, k, v, segment_ids = arrays if segment_ids_BT is not None else (*arrays, None)
    return _IMPLEMENTATIONS[impl](q, k, v, segment_ids)


def check_supported(
    impl: str, *, platform: str, dtype: jnp.dtype | str, head_size: int, seq_len: int
) -> list[str]:
    """Why `impl` cannot run, in words; empty where it can."""
    return []


def xla_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """Attention as `attention` defines it, in its plainest form."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    position = jnp.arange(T)
    allowed_BTS = (position[:, None] >= position[None, :])[None]
    if segment_ids_BT is not None:
        allowed_BTS &= segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    s_BKGTS = jnp.where(allowed_BTS[:, None, None], s_BKGTS * H**-0.5, -jnp.inf)
    p_BKGTS = jax.nn.softmax(s_BKGTS, axis=-1).astype(v_BSKH.dtype)
    o_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS, v_BSKH)
    return checkpoint_name(o_BTKGH.reshape(q_BTNH.shape), "attention")


_IMPLEMENTATIONS = {"xla": xla_attention, "blocked": blocked_attention}
