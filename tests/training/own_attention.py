"""Attention of a user's, right and wrong in several ways."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def unnamed(q, k, v, *, segment_ids, scale, causal=True, softmax=jax.nn.softmax):
    """Plain attention in float32, all heads apart."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    allowed = jnp.tri(q.shape[1], dtype=bool)[None] | (not causal)
    if segment_ids is not None:
        allowed &= segment_ids[:, :, None] == segment_ids[:, None, :]
    s = scale * jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
    p = softmax(jnp.where(allowed[:, None], s, -jnp.inf), axis=-1).astype(q.dtype)
    return jnp.einsum("bnts,bsnh->btnh", p, v)


def attend(q, k, v, **how):
    """What is right, and saved by the policies that save attention."""
    return checkpoint_name(unnamed(q, k, v, **how), "attention")


def attend_in_a_call(q, k, v, **how):
    return jax.jit(lambda q, k, v: attend(q, k, v, **how))(q, k, v)


def unnamed_in_a_call(q, k, v, **how):
    """A function's name is no checkpoint name."""

    @jax.jit
    def attention(q, k, v):
        return unnamed(q, k, v, **how)

    return attention(q, k, v)


def looks_ahead(q, k, v, *, causal, **how):
    return unnamed(q, k, v, causal=False, **how)


def leaks(q, k, v, *, segment_ids, **how):
    return unnamed(q, k, v, segment_ids=None, **how)


def unscaled(q, k, v, *, scale, **how):
    return unnamed(q, k, v, scale=1.0, **how)


def interleaved(q, k, v, **how):
    """Query head n on kv head n % K."""
    B, T, N, H = q.shape
    K = k.shape[2]
    sorted_q = q.reshape(B, T, N // K, K, H).swapaxes(2, 3).reshape(q.shape)
    o = unnamed(sorted_q, k, v, **how)
    return o.reshape(B, T, K, N // K, H).swapaxes(2, 3).reshape(q.shape)


def frozen_keys(q, k, v, **how):
    return unnamed(q, jax.lax.stop_gradient(k), v, **how)


def rounded(q, k, v, **how):
    return unnamed(*(x.astype(jnp.bfloat16) for x in (q, k, v)), **how).astype(q.dtype)


def not_a_number(q, k, v, **how):
    return unnamed(q, k, v, **how) * jnp.asarray(jnp.nan, q.dtype)


def whole_blocks(q, k, v, **how):
    """What follows the last block of 128 queries is lost."""
    o = unnamed(q, k, v, **how)
    return o.at[:, q.shape[1] // 128 * 128 or None :].set(0)


def overflows(q, k, v, **how):
    """A softmax that does not subtract the largest score."""

    def softmax(s, axis):
        return jnp.exp(s) / jnp.exp(s).sum(axis, keepdims=True)

    return unnamed(q, k, v, softmax=softmax, **how)


def alone(q, k, v, *, segment_ids, **how):
    """One document a row is all that it can do."""
    if segment_ids is not None:
        raise NotImplementedError("this kernel knows no documents")
    return unnamed(q, k, v, segment_ids=None, **how)


def bfloat16_out(q, k, v, **how):
    return unnamed(q, k, v, **how).astype(jnp.bfloat16)


def of_arrays_alone(q, k, v):
    return q


not_a_function = "attend"
