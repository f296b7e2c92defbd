"""Causal attention in blocks of queries, never holding the whole score matrix, on any platform.

A block of queries uses the keys up to its own end only, so little more than half of the score
matrix is computed, one block at a time. The forward pass keeps the row log-sum-exp, from which the
backward pass recomputes the probabilities (FlashAttention-2, arXiv:2307.08691). Plain XLA
operations only. All products are batched matrix products over X = B*K with G*T rows, keys
transposed to (H, S): the layouts that XLA's CPU backend multiplies fastest.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

MASKED = -1e30  # finite, so that a fully masked row would stay finite

MIN_BLOCK = 64  # queries; at T = 512 on two CPU cores 32 is slower, 128 and 256 do more work
MAX_BLOCKS = 16  # the program is unrolled over blocks; at 16 the waste is 1/32 of the whole matrix


def block_starts(seq_len: int) -> range:
    """First query of each block; at most 16 blocks, each of at least 64 queries but the last."""
    block = max(MIN_BLOCK, -(-seq_len // (MAX_BLOCKS * MIN_BLOCK)) * MIN_BLOCK)
    return range(0, seq_len, block)


def queries(x_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """(B, T, K*G, H) -> (B*K, G, T, H)."""
    B, T, N, H = x_BTNH.shape
    x = x_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H)
    return x.transpose(0, 2, 3, 1, 4).reshape(B * num_kv_heads, N // num_kv_heads, T, H)


def as_queries(x_XGTH: jax.Array, shape_BTNH: tuple[int, ...]) -> jax.Array:
    """Invert `queries`."""
    B, T, N, H = shape_BTNH
    G = x_XGTH.shape[1]
    return x_XGTH.reshape(B, N // G, G, T, H).transpose(0, 3, 1, 2, 4).reshape(shape_BTNH)


def _keys(x_BSKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(B, S, K, H) -> (B*K, S, H) and (B*K, H, S)."""
    B, S, K, H = x_BSKH.shape
    return (
        x_BSKH.transpose(0, 2, 1, 3).reshape(B * K, S, H),
        x_BSKH.transpose(0, 2, 3, 1).reshape(B * K, H, S),
    )


def _rows(x_XGTH: jax.Array, start: int, end: int) -> jax.Array:
    """Queries [start, end) of all heads of a group as the rows of one matrix: (X, G*t, H)."""
    X, G, _, H = x_XGTH.shape
    return x_XGTH[:, :, start:end].reshape(X, G * (end - start), H)


def _after(x: jax.Array, *previous: jax.Array) -> jax.Array:
    """Return `x`, made to depend on `previous`.

    Otherwise XLA's CPU scheduler starts all blocks at once and keeps the scores of all: as much
    memory as the whole matrix. It removes optimization barriers before it schedules, so this adds a
    zero that it cannot know to be zero: nothing is greater than infinity. It costs a tenth of the
    time and is left out up to T = 1024, where that memory is small.
    """
    for array in previous:
        zero = jnp.where(array.reshape(-1)[0] > jnp.inf, 1.0, 0.0)
        x = x + zero.astype(x.dtype)
    return x


def matmul(a: jax.Array, b: jax.Array, *, transpose_a: bool = False) -> jax.Array:
    """Batched product (X, m, k) (X, k, n) in float32; with `transpose_a`, `a` is (X, k, m)."""
    dims = (((1 if transpose_a else 2,), (1,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _scores(q_XRH, kT_XHS, segment_ids_BT, batch: int, start: int, end: int) -> jax.Array:
    """Scaled and masked scores (X, R, end) of the queries [start, end), float32."""
    X, R, H = q_XRH.shape
    s = matmul(q_XRH, kT_XHS[:, :, :end]) * H**-0.5
    allowed = (jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :])[None]
    if segment_ids_BT is not None:
        same = segment_ids_BT[:, start:end, None] == segment_ids_BT[:, None, :end]
        allowed = allowed & same
    s = s.reshape(batch, X // batch, R // (end - start), end - start, end)
    return jnp.where(allowed[:, None, None], s, MASKED).reshape(X, R, end)


@jax.custom_vjp
def blocked_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """Compute `attention` in blocks; save q, k, v, o and one float32 a query row.

    The output and the row statistics have the checkpoint name "attention".
    """
    return _tagged_forward(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)[0]


def forward(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT):
    """Return the output, and for `backward` the inputs, the output, log-sum-exp (B*K, G, T)."""
    B, T, _, H = q_BTNH.shape
    q_XGTH = queries(q_BTNH, k_BSKH.shape[2])
    (_, kT_XHS), (v_XSH, _) = _keys(k_BSKH), _keys(v_BSKH)
    X, G = q_XGTH.shape[:2]
    outputs, statistics = [], []
    starts = block_starts(T)
    for start in starts:
        end = min(start + starts.step, T)
        q = _rows(q_XGTH, start, end)
        if outputs and starts.step > MIN_BLOCK:
            q = _after(q, outputs[-1])
        s = _scores(q, kT_XHS, segment_ids_BT, B, start, end)
        top = jnp.max(s, axis=-1, keepdims=True)
        p = jnp.exp(s - top)
        total = jnp.sum(p, axis=-1, keepdims=True)
        o = matmul(p.astype(v_XSH.dtype), v_XSH[:, :end]) / total
        outputs.append(o.astype(q_BTNH.dtype).reshape(X, G, end - start, H))
        statistics.append((top + jnp.log(total)).reshape(X, G, end - start))
    o_BTNH = as_queries(jnp.concatenate(outputs, axis=2), q_BTNH.shape)
    lse_XGT = jnp.concatenate(statistics, axis=2)
    return o_BTNH, (q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, o_BTNH, lse_XGT)


def _tagged_forward(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT):
    o, (*inputs, _, lse) = forward(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
    o, lse = checkpoint_name(o, "attention"), checkpoint_name(lse, "attention")
    return o, (*inputs, o, lse)


def backward(saved, do_BTNH):
    """Gradients of q, k, v and none for the segment ids, from the gradient of the output."""
    q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, o_BTNH, lse_XGT = saved
    B, T, _, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_XGTH, do_XGTH = queries(q_BTNH, K), queries(do_BTNH, K)
    (k_XSH, kT_XHS), (_, vT_XHS) = _keys(k_BSKH), _keys(v_BSKH)
    X, G = q_XGTH.shape[:2]
    # sum over keys of p * dp, from the output alone
    inner = jnp.sum(o_BTNH.astype(jnp.float32) * do_BTNH.astype(jnp.float32), -1, keepdims=True)
    inner_XGT1, lse_XGT1 = queries(inner, K), lse_XGT[..., None]
    dq, dkT, dvT = [], None, None
    starts = block_starts(T)
    for start in reversed(starts):  # the last block first: its keys are all keys
        end = min(start + starts.step, T)
        q, do = _rows(q_XGTH, start, end), _rows(do_XGTH, start, end)
        if dq and starts.step > MIN_BLOCK:
            q, do = (_after(x, dq[-1], dkT, dvT) for x in (q, do))
        s = _scores(q, kT_XHS, segment_ids_BT, B, start, end)
        p = jnp.exp(s - _rows(lse_XGT1, start, end))
        dp = matmul(do, vT_XHS[:, :, :end])
        ds = (p * (dp - _rows(inner_XGT1, start, end)) * H**-0.5).astype(q.dtype)
        dq.append(matmul(ds, k_XSH[:, :end]).astype(q.dtype).reshape(X, G, end - start, H))
        dkT = _added(dkT, matmul(q, ds, transpose_a=True))
        dvT = _added(dvT, matmul(do, p.astype(do.dtype), transpose_a=True))
    dq_BTNH = as_queries(jnp.concatenate(dq[::-1], axis=2), q_BTNH.shape)
    return dq_BTNH, _as_keys(dkT, k_BSKH), _as_keys(dvT, v_BSKH), None


def _added(total_XHS: jax.Array | None, part: jax.Array) -> jax.Array:
    """The gradient of all keys so far, plus a block's gradient of the keys up to its end."""
    return part if total_XHS is None else total_XHS.at[:, :, : part.shape[2]].add(part)


def _as_keys(x_XHS: jax.Array, like_BSKH: jax.Array) -> jax.Array:
    B, S, K, H = like_BSKH.shape
    return x_XHS.reshape(B, K, H, S).transpose(0, 3, 1, 2).astype(like_BSKH.dtype)


blocked_attention.defvjp(_tagged_forward, backward)
