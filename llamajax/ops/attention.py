"""Causal self-attention over packed documents: one function, several implementations.

- `xla`: the readable reference; holds the whole T x S matrix. Any platform.
- `blocked`: a sixteenth of that matrix at a time, plain XLA operations; the fast one on a CPU and
  wherever no fused kernel exists. Any platform.
- `cudnn`: NVIDIA's fused kernel, with the documents given as offsets (`attention_kernels.py`).
- `splash`: the Pallas kernel for TPUs, with segment ids (`attention_kernels.py`).
- `module:function`: a function of the user's (`attention_own.py`).
- `split`: for a sequence that is split over the mesh axis `sequence`, and for very long ones: never
  more scores than those of 512 x 512 tokens a head (`attention_split.py`). Any platform.

All but `split` communicate nothing: they work the same outside and inside `jax.shard_map`, where
batch and heads may be split. The output (and the row statistics of those that do not hold the whole
matrix) has the checkpoint name "attention": a remat policy that keeps this name keeps the backward
pass from running the forward kernel again, and only q, k and v are recomputed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llamajax.backends import Machine, platform_facts, platform_of_attention
from llamajax.backends.jax_private import cudnn
from llamajax.errors import combine
from llamajax.ops.attention_blocked import block_starts, blocked_attention
from llamajax.ops.attention_kernels import (
    TOKENS_PER_DOCUMENT,
    cudnn_attention,
    cudnn_documents,
    splash_attention,
)
from llamajax.ops.attention_own import is_own, own_attention, own_function
from llamajax.ops.attention_split import block_size, pair_table, split_attention
from llamajax.sharding import collectives

FUSED = ("cudnn", "splash")
SUPPORTED = ("xla", "blocked", "split", *FUSED)


def needs_unchecked(impl: str) -> bool:
    """Return whether `jax.shard_map` needs check_vma=False around `impl`.

    JAX's Splash kernel does not say along which mesh axes its outputs vary, and the user's own may
    not.
    """
    return impl == "splash" or is_own(impl)


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    impl: str,
    segment_ids_BT: jax.Array | cudnn.Documents | None,
) -> jax.Array:
    """Attend from each query to the earlier keys of its own document, (B, T, N, H).

    T equals S; for `split` inside `shard_map` q, k and v are those of the device's local tokens,
    and the segment ids those of the whole sequence. N is a multiple of K and query head n uses kv
    head n // (N / K). Scores are scaled by H**-0.5, the softmax is float32, the output has the
    dtype of q. `segment_ids` (int32) numbers the documents packed in a row, each of them
    contiguous; 0 is padding, which attends to itself only and so stays finite. Without segment ids
    a row is one document. The result of `documents_for` may replace the ids. For `cudnn`,
    documents that its kernel has no room for (`kernel_has_room`) are lost: go through
    `models.sharded_step.by_documents`, which computes such a batch with `split`.
    """
    assert q_BTNH.shape[1] == k_BSKH.shape[1], "self-attention: as many queries as keys"
    assert q_BTNH.shape[2] % k_BSKH.shape[2] == 0, (q_BTNH.shape, k_BSKH.shape)
    # One type for all inside shard_map. Where k is the same on several devices of an axis and q is
    # not, the derivative of this cast sums dk over that axis.
    operands = (q_BTNH, k_BSKH, v_BSKH, documents_for(impl, segment_ids_BT))
    arrays = jax.tree.leaves(operands)
    operands = jax.tree.map(lambda x: collectives.pcast_varying_like(x, *arrays), operands)
    if is_own(impl):
        return own_attention(*operands, name=impl)
    return _IMPLEMENTATIONS[impl](*operands)


def documents_for(impl: str, segment_ids_BT: Any) -> Any:
    """Return the documents of packed rows in the form of `impl`, once for all layers.

    cuDNN's kernel has room for T / 128 a row on average (`kernel_has_room`).
    """
    if impl == "cudnn" and isinstance(segment_ids_BT, jax.Array):
        return cudnn_documents(segment_ids_BT)
    return segment_ids_BT


def check_supported(
    impl: str,
    *,
    platform: str,
    dtype: jnp.dtype | str,
    head_size: int,
    seq_len: int,
    compute_capability: str | None = None,
    sequence_parts: int = 1,
) -> list[str]:
    """Say why `impl` cannot train such a model on `platform`; nothing where it can.

    `platform` is "cpu", "cuda" (or JAX's other word for it, "gpu"), "tpu" or a plugin's name;
    `compute_capability` that of the NVIDIA device ("9.0" for Hopper), where it is known.
    """
    dtype = jnp.dtype(dtype)
    if is_own(impl):
        own_function(impl)
    elif impl not in SUPPORTED:
        return [
            f"{impl!r} is not an attention implementation: choose one of {', '.join(SUPPORTED)}, "
            "or module:function"
        ]
    if sequence_parts > 1 and impl != "split":
        return [
            f"{impl} attention sees one device's tokens only, and mesh.sequence = {sequence_parts} "
            "splits them: use split"
        ]
    facts = {
        f"needs platform {platform_of_attention(impl)}, this is {platform}": (
            impl not in FUSED or impl in platform_facts(platform).fused_attention
        )
    }
    if impl == "cudnn":
        facts |= {
            f"needs bfloat16 or float16, not {dtype}": dtype in (jnp.bfloat16, jnp.float16),
            f"needs a head size that is a multiple of 8, at most 256; it is {head_size}": (
                head_size % 8 == 0 and head_size <= 256
            ),
            "needs a GPU of compute capability 9.0 (Hopper) or later for packed documents, "
            f"this one has {compute_capability}": (
                compute_capability is None or float(compute_capability) >= 9.0
            ),
        }
    if impl == "splash":
        facts |= {
            f"needs bfloat16 or float32, not {dtype}": dtype in (jnp.bfloat16, jnp.float32),
            f"needs a head size that is a multiple of 64; it is {head_size}": head_size % 64 == 0,
            f"needs a sequence length that is a multiple of 128; it is {seq_len}": (
                seq_len % 128 == 0
            ),
        }
    problems = [f"{impl} attention {fact}" for fact, holds in facts.items() if not holds]
    if impl == "cudnn" and (why := cudnn.problem()):
        problems.append(why)
    return problems


class AttentionChoice(NamedTuple):
    """An implementation, and why it was taken. is_second_best: a faster one was passed over."""

    impl: str
    reason: str
    is_second_best: bool = False

    def warnings(self) -> list[str]:
        """Return a line about a faster implementation that was not chosen, or nothing."""
        return [f"attention {self.impl}, because {self.reason}"] * self.is_second_best


def choose_attention(asked: str, preferences: Sequence[str], **facts: Any) -> AttentionChoice:
    """Return the implementation that was asked for, or the first of `preferences` for `auto`.

    facts: of `check_supported`. Raises UserError with every reason where none can be used.
    """
    if asked != "auto":
        if problems := check_supported(asked, **facts):
            raise combine(problems, title=f"train.attention = {asked!r} cannot run here:")
        proof = ", which a run proves before it compiles" * is_own(asked)
        return AttentionChoice(asked, f"train.attention = {asked}{proof}")
    problems, platform = [], facts["platform"]
    for impl in preferences:
        if found := check_supported(impl, **facts):
            problems += found
        elif problems:
            return AttentionChoice(impl, "; ".join(problems), not platform_facts(platform).is_host)
        elif impl in FUSED or platform_facts(platform).is_host:
            return AttentionChoice(impl, f"the first choice on {platform}")
        else:
            reason = f"no fused kernel is known for {platform}, or the doctor saw it fail"
            return AttentionChoice(impl, reason, is_second_best=True)
    raise combine(problems, title="no attention implementation fits this run:")


def best_attention(machine: Machine, dtype: str, head_size: int, seq_len: int) -> AttentionChoice:
    """Return the machine's first choice that can compute whole sequences of this length."""
    return choose_attention(
        "auto",
        machine.attention_preferences,
        platform=machine.platform,
        compute_capability=machine.compute_capability,
        dtype=dtype,
        head_size=head_size,
        seq_len=seq_len,
    )


def falls_back(impl: str) -> str:
    """Describe which sequences another implementation computes although `impl` was chosen."""
    rows = f", and steps with more than a document per {TOKENS_PER_DOCUMENT} tokens"
    return f"split for mesh.sequence above 1{rows * (impl == 'cudnn')}"


def computed_scores(impl: str, seq_len: int, *, parts: int) -> int | None:
    """Return the entries of the T x S matrix that `impl` computes, masked ones included.

    parts: of the sequence, for `split`. None for a kernel.
    """
    if impl == "xla":
        return seq_len * seq_len
    if impl == "blocked":
        starts = block_starts(seq_len)
        return sum((min(b + starts.step, seq_len) - b) * min(b + starts.step, seq_len)
                   for b in starts)  # fmt: skip
    if impl == "split":
        block = block_size(seq_len, parts)
        return pair_table(seq_len, parts, block)[..., 0].size * block * block
    return None


def xla_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """Compute `attention` with the whole score matrix."""
    position = jnp.arange(q_BTNH.shape[1])
    allowed_BTS = (position[:, None] >= position[None, :])[None]
    if segment_ids_BT is not None:
        allowed_BTS &= segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    o_BTNH = plain_attention(q_BTNH, k_BSKH, v_BSKH, allowed_BTS, keys="BSKH")
    return checkpoint_name(o_BTNH, "attention")


def plain_attention(
    q_BTNH: jax.Array, k: jax.Array, v: jax.Array, allowed_BTS: jax.Array, *, keys: str
) -> jax.Array:
    """Attend from each query to the keys that it may see, with all scores at once, (B, T, N, H).

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


_IMPLEMENTATIONS = {
    "xla": xla_attention,
    "blocked": blocked_attention,
    "split": split_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}
