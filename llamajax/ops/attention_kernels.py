"""Fused attention kernels of accelerators: cuDNN's on NVIDIA, Splash on TPU.

Neither has run on its hardware yet: both are checked by lowering for the platform and reading the
program; Splash also numerically, interpreted on a CPU, and compiled for absent TPUs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llamajax.backends.jax_private import cudnn
from llamajax.sharding.collectives import pcast_varying_like

# cuDNN needs a bound on the documents of a batch, and its row statistics take 4 bytes for each of
# B * bound * N * T: at 128 tokens a document, half the output's size at T = 4096, H = 128.
TOKENS_PER_DOCUMENT = 128
MIN_DOCUMENTS = 8

# compiles for v4, v5e, v5p and v6e, H of 64 and 128, bfloat16 and float32, forward and backward;
# not tuned on hardware
SPLASH_BLOCK = 512


@jax.custom_vjp
def cudnn_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, docs: cudnn.Documents | None
) -> jax.Array:
    """Compute `attention` with cuDNN's fused kernel: bfloat16 or float16.

    docs: of `cudnn_documents`; None where each row is one document.
    """
    return _cudnn_forward(q_BTNH, k_BSKH, v_BSKH, docs)[0]


def _cudnn_forward(q_BTNH, k_BSKH, v_BSKH, docs):
    o, statistics = (
        checkpoint_name(pcast_varying_like(x, q_BTNH), "attention")
        for x in cudnn.forward(q_BTNH, k_BSKH, v_BSKH, docs)
    )
    return o, (q_BTNH, k_BSKH, v_BSKH, docs, statistics, o)


def _cudnn_backward(saved, do_BTNH):
    grads = zip(cudnn.backward(*saved, do_BTNH), saved[:3], strict=True)
    return *(pcast_varying_like(grad, x) for grad, x in grads), None


cudnn_attention.defvjp(_cudnn_forward, _cudnn_backward)


def max_documents(seq_len: int) -> int:
    """Documents a row that the kernel has room for, on average over the rows of one call."""
    return max(MIN_DOCUMENTS, seq_len // TOKENS_PER_DOCUMENT)


def cudnn_documents(segment_ids_BT: jax.Array) -> cudnn.Documents:
    """Return where documents begin, for all layers; those that the kernel has no room for are lost.

    `kernel_has_room` says whether there are such.
    """
    most = max_documents(segment_ids_BT.shape[1])
    return cudnn.documents(segment_ids_BT, max_documents=most)


def kernel_has_room(segment_ids_BT: jax.Array, *, rows: int) -> jax.Array:
    """Return whether the documents fit into the kernel, called with so many rows at a time."""
    count_B = 1 + jnp.sum(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], axis=1)
    room = rows * max_documents(segment_ids_BT.shape[1])
    return jnp.all(jnp.sum(count_B.reshape(-1, rows), axis=1) <= room)


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
