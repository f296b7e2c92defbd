"""Sampling of the next token of each row, from float32 logits.

The steps and their order are those of transformers: repetition penalty, temperature, top-k, top-p.
"""

import jax
import jax.numpy as jnp

from llamajax.decoding.generate_options import Sampling


def sample(
    logits_BV: jax.Array,
    sampling: Sampling,
    *,
    seed: jax.Array,
    numbers_B: jax.Array,
    index: jax.Array,
    seen_BV: jax.Array | None,
) -> jax.Array:
    """Draw token ids (B,), int32, from float32 logits; at temperature 0 the largest ones.

    Among equal logits the lowest id counts. The random bits of a row are a function of `seed`, the
    number of its prompt (`numbers_B`) and the `index` of the new token: not of the mesh, nor of
    other rows. `seen_BV`: bool, the tokens of prompt and output, for the repetition penalty.
    """
    if sampling.penalizes:
        logits_BV = penalize(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature:
        logits_BV = keep_top(scale(logits_BV, sampling.temperature), sampling)
        logits_BV += _gumbel(seed, numbers_B, index, logits_BV.shape[1])
    return jnp.argmax(logits_BV, axis=1).astype(jnp.int32)


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Make seen tokens less probable, for either sign (Keskar et al. 2019, arXiv:1909.05858)."""
    changed_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, changed_BV, logits_BV)


def scale(logits_BV: jax.Array, temperature: float) -> jax.Array:
    """Divide logits by the temperature; the largest becomes 0, so that none overflows."""
    return (logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)) / temperature


def keep_top(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Set logits to -inf that top-k, or top-p of what top-k left, leaves out.

    Tokens as probable as the last one kept are kept, too.
    """
    top_k, top_p, size = sampling.top_k, sampling.top_p, logits_BV.shape[1]
    if (top_k is None or top_k >= size) and top_p in (None, 1.0):
        return logits_BV
    falling_BV = jnp.sort(logits_BV, axis=1, descending=True)
    if top_k is not None and top_k < size:
        falling_BV = jnp.where(falling_BV >= falling_BV[:, top_k - 1, None], falling_BV, -jnp.inf)
    count_B = jnp.sum(falling_BV > -jnp.inf, axis=1)
    if top_p not in (None, 1.0):
        p_BV = jax.nn.softmax(falling_BV, axis=1)
        before_BV = jnp.cumsum(p_BV, axis=1) - p_BV  # exactly 0 for the first: it always stays
        count_B = jnp.minimum(count_B, jnp.sum(before_BV < top_p, axis=1))
    least_B1 = jnp.take_along_axis(falling_BV, count_B[:, None] - 1, axis=1)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def _gumbel(seed: jax.Array, numbers_B: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """Gumbel noise (B, V): adding it and taking the largest draws from the softmax."""
    key = jax.random.key(seed, impl="threefry2x32")

    def one(number: jax.Array) -> jax.Array:
        row_key = jax.random.fold_in(jax.random.fold_in(key, number), index)
        return jax.random.gumbel(row_key, (size,), jnp.float32)

    return jax.vmap(one)(numbers_B)
