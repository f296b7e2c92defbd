"""Causal attention over a sequence that is split over the mesh axis `sequence`.

Each device holds two pieces of S / (2 * count) tokens, one from the front and the mirrored one from
the back, so that the causal triangle costs every device the same. Keys and values are gathered
(with grouped queries they are small; Llama 3, arXiv:2407.21783, section 3.3.2), queries stay. Then
each device visits its pairs of a block of queries and a block of keys one by one, in a scan: as
many pairs on every device, none above the diagonal, and the scores of one pair at a time, so that
no S x S buffer exists. The sums over keys are those of FlashAttention-2 (arXiv:2307.08691), forward
and backward.

Dims: `count` devices along `sequence`, S tokens of a sequence, T local ones; X = B*K, with the G
query heads of a group as rows, as in `attention_blocked`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llamajax.ops.attention_blocked import MASKED, as_queries, matmul, queries
from llamajax.sharding import collectives

AXIS = "sequence"
MAX_BLOCK = 512  # queries and keys of a pair


def local_tokens(x_BS: jax.Array) -> jax.Array:
    """Select this device's columns of an array over all tokens: (B, S, ...) -> (B, T, ...)."""
    count = collectives.axis_size(AXIS)
    if count == 1:
        return x_BS
    rank, piece = collectives.axis_index(AXIS), x_BS.shape[1] // (2 * count)
    starts = (rank * piece, (2 * count - 1 - rank) * piece)
    parts = [jax.lax.dynamic_slice_in_dim(x_BS, start, piece, axis=1) for start in starts]
    return jnp.concatenate(parts, axis=1)


def _take_pieces(x: jax.Array, order: Sequence[int]) -> jax.Array:
    """Cut dimension 1 into as many pieces as `order` names, and join them in that order."""
    pieces = jnp.split(x, len(order), axis=1)
    return jnp.concatenate([pieces[i] for i in order], axis=1)


def pair_table(num_tokens: int, count: int, block: int) -> np.ndarray:
    """(count, pairs, 3) int32: for each device its pairs as numbers of blocks.

    The columns are the block of queries among the local ones, the same block in the whole
    sequence, and the block of keys in the whole sequence; keys ascend within a block of queries.
    """
    each = num_tokens // (2 * count * block)  # blocks a piece
    rows = []
    for rank in range(count):
        whole = [piece * each + i for piece in (rank, 2 * count - 1 - rank) for i in range(each)]
        rows.append([(local, q, k) for local, q in enumerate(whole) for k in range(q + 1)])
    return np.asarray(rows, np.int32)


def block_size(num_tokens: int, count: int) -> int:
    """The largest divisor of a piece that is at most MAX_BLOCK."""
    piece = num_tokens // (2 * count)
    return max(b for b in range(1, min(piece, MAX_BLOCK) + 1) if piece % b == 0)


def _pairs(num_tokens: int, count: int, block: int) -> jax.Array:
    return jnp.asarray(pair_table(num_tokens, count, block))[collectives.axis_index(AXIS)]


def _at(x: jax.Array, number: jax.Array, block: int, *, dim: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, number * block, block, axis=dim)


def _put(x: jax.Array, part: jax.Array, number: jax.Array, block: int, *, dim: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, number * block, axis=dim)


def _rows_of(x_XGTH: jax.Array, number: jax.Array, block: int) -> jax.Array:
    """One block of queries of all heads of a group as rows: (X, G * block, H)."""
    X, G, _, H = x_XGTH.shape
    return _at(x_XGTH, number, block, dim=2).reshape(X, G * block, H)


def _scores(q_XRH, k_XSH, segment_ids_BT, pair, block: int, batch: int) -> jax.Array:
    """Scaled, masked scores (X, R, block) of one pair, float32."""
    X, R, H = q_XRH.shape
    s = matmul(q_XRH, _at(k_XSH, pair[2], block, dim=1).swapaxes(1, 2)) * H**-0.5
    at = jnp.arange(block)
    allowed = (pair[1] * block + at[:, None] >= pair[2] * block + at[None, :])[None]
    if segment_ids_BT is not None:
        mine = _at(segment_ids_BT, pair[1], block, dim=1)
        theirs = _at(segment_ids_BT, pair[2], block, dim=1)
        allowed = allowed & (mine[:, :, None] == theirs[:, None, :])
    s = s.reshape(batch, X // batch, R // block, block, block)
    return jnp.where(allowed[:, None, None], s, MASKED).reshape(X, R, block)


def _gathered(x_BTKH: jax.Array, count: int) -> jax.Array:
    """Gather keys or values of all tokens, in the order of the sequence: (X, S, H)."""
    by_device = collectives.all_gather(x_BTKH, AXIS, dim=1)  # front 0, back 0, front 1, ...
    whole = _take_pieces(by_device, [*range(0, 2 * count, 2), *range(2 * count - 1, 0, -2)])
    B, S, K, H = whole.shape
    return whole.transpose(0, 2, 1, 3).reshape(B * K, S, H)


@jax.custom_vjp
def split_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BS: jax.Array | None
) -> jax.Array:
    """Compute `attention` of this device's tokens over all tokens.

    q, k and v are those of the local tokens (`local_tokens`), the segment ids those of the whole
    sequence. Saves the local q, k, v, o and one float32 a query row; keys and values are gathered
    again in backward.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BS)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BS):
    count, (B, T, _, _) = collectives.axis_size(AXIS), q_BTNH.shape
    S, block = T * count, block_size(T * count, count)
    q, k, v = queries(q_BTNH, k_BTKH.shape[2]), _gathered(k_BTKH, count), _gathered(v_BTKH, count)
    X, G, _, H = q.shape

    def visit(carry, pair):
        s = _scores(_rows_of(q, pair[0], block), k, segment_ids_BS, pair, block, B)
        old_o, old_total, old_top = (_rows_of(a, pair[0], block) for a in carry)
        new_top = jnp.maximum(old_top, jnp.max(s, axis=-1, keepdims=True))
        # a pair of two documents has no allowed score: exp(MASKED - MASKED) would count it
        p = jnp.where(s > MASKED, jnp.exp(s - new_top), 0.0)
        fade = jnp.exp(old_top - new_top)
        added = matmul(p.astype(v.dtype), _at(v, pair[2], block, dim=1))
        new_total = old_total * fade + jnp.sum(p, axis=-1, keepdims=True)
        new = (old_o * fade + added, new_total, new_top)
        new = (a.reshape(X, G, block, a.shape[-1]) for a in new)
        put = functools.partial(_put, number=pair[0], block=block, dim=2)
        return tuple(put(a, b) for a, b in zip(carry, new, strict=True)), None

    shape = (X, G, T)
    carry = (
        jnp.zeros((*shape, H)),
        jnp.zeros((*shape, 1)),
        jnp.full((*shape, 1), MASKED, jnp.float32),
    )
    carry = tuple(collectives.pcast_varying_like(a, q, k, v) for a in carry)
    (o, total, top), _ = jax.lax.scan(visit, carry, _pairs(S, count, block))
    o_BTNH = as_queries((o / total).astype(q_BTNH.dtype), q_BTNH.shape)
    lse = checkpoint_name(top + jnp.log(total), "attention")
    o_BTNH = checkpoint_name(o_BTNH, "attention")
    return o_BTNH, (q_BTNH, k_BTKH, v_BTKH, segment_ids_BS, o_BTNH, lse)


def _backward(saved, do_BTNH):
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BS, o_BTNH, lse = saved
    count, (B, T, _, _), K = collectives.axis_size(AXIS), q_BTNH.shape, k_BTKH.shape[2]
    S, block = T * count, block_size(T * count, count)
    q, do = queries(q_BTNH, K), queries(do_BTNH, K)
    k, v = _gathered(k_BTKH, count), _gathered(v_BTKH, count)
    X, G, _, H = q.shape
    inner = jnp.sum(o_BTNH.astype(jnp.float32) * do_BTNH.astype(jnp.float32), -1, keepdims=True)
    inner = queries(inner, K)

    def visit(carry, pair):
        dq, dk, dv = carry
        rows = functools.partial(_rows_of, number=pair[0], block=block)
        keys = functools.partial(_at, number=pair[2], block=block, dim=1)
        q_XRH, do_XRH = rows(q), rows(do)
        s = _scores(q_XRH, k, segment_ids_BS, pair, block, B)
        p = jnp.where(s > MASKED, jnp.exp(s - rows(lse)), 0.0)
        dp = matmul(do_XRH, keys(v).swapaxes(1, 2))
        ds = (p * (dp - rows(inner)) * H**-0.5).astype(q.dtype)
        dq_part = (rows(dq) + matmul(ds, keys(k))).reshape(X, G, block, H)
        dk_part = keys(dk) + matmul(ds, q_XRH, transpose_a=True)
        dv_part = keys(dv) + matmul(p.astype(do.dtype), do_XRH, transpose_a=True)
        put = functools.partial(_put, number=pair[2], block=block, dim=1)
        dq = _put(dq, dq_part, pair[0], block, dim=2)
        return (dq, put(dk, dk_part), put(dv, dv_part)), None

    zeros = [jnp.zeros(a.shape, jnp.float32) for a in (q, k, v)]
    carry = tuple(collectives.pcast_varying_like(a, q, k, v, do) for a in zeros)
    (dq, dk, dv), _ = jax.lax.scan(visit, carry, _pairs(S, count, block))
    dk, dv = (_local_keys(a, count, like) for a, like in ((dk, k_BTKH), (dv, v_BTKH)))
    return as_queries(dq.astype(q.dtype), q_BTNH.shape), dk, dv, None


def _local_keys(x_XSH: jax.Array, count: int, like_BTKH: jax.Array) -> jax.Array:
    """Sum gradients of all keys over devices in float32, and keep those of the local keys."""
    B, _, K, H = like_BTKH.shape
    x_BSKH = x_XSH.reshape(B, K, x_XSH.shape[1], H).transpose(0, 2, 1, 3)
    order = [piece for i in range(count) for piece in (i, 2 * count - 1 - i)]
    local = collectives.psum_scatter(_take_pieces(x_BSKH, order), AXIS, dim=1)
    return local.astype(like_BTKH.dtype)


split_attention.defvjp(_forward, _backward)
