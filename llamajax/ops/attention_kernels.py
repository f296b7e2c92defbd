"""Fused attention kernels of accelerators: cuDNN's on NVIDIA, Splash on TPU.

Neither has run on its hardware yet: both are checked by lowering for the platform and reading the
program; Splash also numerically, interpreted on a CPU, and compiled for absent TPUs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llamajax.backends.jax_private import cudnn
from llamajax.ops import attention_blocked

# cuDNN needs a bound on the documents of a batch, and its row statistics take 4 bytes for each of
# B * bound * N * T: at 128 tokens a document, half the output's size at T = 4096, H = 128.
TOKENS_PER_DOCUMENT = 128
MIN_DOCUMENTS = 8

# compiles for v4, v5e, v5p and v6e, H of 64 and 128, bfloat16 and float32, forward and backward;
# not tuned on hardware
SPLASH_BLOCK = 512


@jax.custom_vjp
def cudnn_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """Compute `attention` with cuDNN's fused kernel: bfloat16 or float16.

    Documents are given as lengths and offsets, at most T / 128 a row on average over the local
    batch. A batch with more takes a slow exact path (blocks, one kv head at a time) instead.
    """
    return _cudnn_forward(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)[0]


def _cudnn_forward(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT):
    qkv = (q_BTNH, k_BSKH, v_BSKH)
    if segment_ids_BT is None:
        o, statistics = cudnn.forward(*qkv, None)
    else:
        docs, fits = _documents(q_BTNH, k_BSKH, segment_ids_BT)
        operands = (*qkv, docs, segment_ids_BT)
        o, statistics = jax.lax.cond(fits, _fused_forward, _slow_forward, *operands)
    o, statistics = checkpoint_name(o, "attention"), checkpoint_name(statistics, "attention")
    return o, (*qkv, segment_ids_BT, statistics, o)


def _cudnn_backward(saved, do_BTNH):
    q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, statistics, o_BTNH = saved
    qkv = (q_BTNH, k_BSKH, v_BSKH)
    if segment_ids_BT is None:
        return *cudnn.backward(*qkv, None, statistics, o_BTNH, do_BTNH), None
    docs, fits = _documents(q_BTNH, k_BSKH, segment_ids_BT)
    operands = (*qkv, docs, segment_ids_BT, statistics, o_BTNH, do_BTNH)
    return *jax.lax.cond(fits, _fused_backward, _slow_backward, *operands), None


cudnn_attention.defvjp(_cudnn_forward, _cudnn_backward)


def max_documents(seq_len: int) -> int:
    """Documents a row that the kernel has room for, on average over the local batch."""
    return max(MIN_DOCUMENTS, seq_len // TOKENS_PER_DOCUMENT)


def _documents(q_BTNH, k_BSKH, segment_ids_BT):
    _, T, N, H = q_BTNH.shape
    kv_stride, most = k_BSKH.shape[2] * H, max_documents(T)
    return cudnn.documents(segment_ids_BT, max_documents=most, q_stride=N * H, kv_stride=kv_stride)


def _fused_forward(q, k, v, docs, _):
    return cudnn.forward(q, k, v, docs)


def _fused_backward(q, k, v, docs, _, statistics, o, do):
    return cudnn.backward(q, k, v, docs, statistics, o, do)


def _by_kv_head(x: jax.Array, num_kv_heads: int) -> jax.Array:
    """(B, T, K*G, ...) -> (B*K, 1, T, G, ...): one kv head with its queries at a time."""
    B, T, N, *rest = x.shape
    x = x.reshape(B, T, num_kv_heads, N // num_kv_heads, *rest)
    return jnp.moveaxis(x, 2, 1).reshape(B * num_kv_heads, 1, T, N // num_kv_heads, *rest)


def _from_kv_heads(x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_by_kv_head`."""
    B, T, _, H = like.shape
    x = x.reshape(B, x.shape[0] // B, T, x.shape[3], H)
    return jnp.moveaxis(x, 1, 2).reshape(like.shape)


def _slow_forward(q, k, v, docs, segment_ids_BT):
    """Compute what the kernel returns, for any number of documents.

    The log-sum-exp is in the first B rows of the statistics.
    """
    K = k.shape[2]

    def one(parts):
        o, saved = attention_blocked.forward(*parts)
        return o, saved[-1]

    segment_ids = jnp.repeat(segment_ids_BT, K, axis=0)[:, None]
    parts = (_by_kv_head(q, K), _by_kv_head(k, K), _by_kv_head(v, K), segment_ids)
    o, lse = jax.lax.map(one, parts)
    B, T, N, _ = q.shape
    unused = docs.lengths.size - B
    return _from_kv_heads(o, q), jnp.pad(lse.reshape(B, N, T), ((0, unused), (0, 0), (0, 0)))


def _slow_backward(q, k, v, docs, segment_ids_BT, statistics, o, do):
    B, T, N, _ = q.shape
    K = k.shape[2]
    segment_ids = jnp.repeat(segment_ids_BT, K, axis=0)[:, None]
    lse = statistics[:B].reshape(B * K, 1, N // K, T)
    inputs = (_by_kv_head(q, K), _by_kv_head(k, K), _by_kv_head(v, K), segment_ids)
    saved = (*inputs, _by_kv_head(o, K), lse)
    grads = jax.lax.map(
        lambda parts: attention_blocked.backward(parts[:-1], parts[-1])[:3],
        (*saved, _by_kv_head(do, K)),
    )
    return tuple(_from_kv_heads(g, like) for g, like in zip(grads, (q, k, v), strict=True))


def splash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Compute `attention` with JAX's Pallas kernel for TPUs.

    T is a multiple of 128. The causal mask is a function of positions, not an array. With
    `interpret` the kernel is evaluated step by step on any platform: slow, for tests.
    """
    _, T, N, H = q_BTNH.shape
    kernel = _splash_kernel(T, N, interpret)
    scaled = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    splash, _ = _splash()
    q_BNTH = jnp.swapaxes(scaled, 1, 2)
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    ids = None if segment_ids_BT is None else splash.SegmentIds(segment_ids_BT, segment_ids_BT)
    o_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, ids)
    return jnp.swapaxes(o_BNTH, 1, 2)


def _splash() -> tuple[Any, Any]:
    """Import the kernel's modules, which takes 0.2 s, when a TPU needs them."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    return kernel, masks


def _splash_kernel(seq_len: int, num_heads: int, interpret: bool) -> Any:
    splash, masks = _splash()
    block = next(b for b in (SPLASH_BLOCK, 384, 256, 128) if seq_len % b == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((seq_len, seq_len))] * num_heads)
    return splash.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
