"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split as in Hugging Face.

Dimension i of a head is rotated together with dimension i + H/2. Meta's own files interleave the
pairs (i, i + 1) instead; converting them permutes q and k once.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.config.model_schema import RopeScaling


def frequencies(head_size: int, *, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians a position of each of the H/2 pairs, float32 (H/2,).

    linear divides all by `factor`. llama3 and yarn keep what turns often in the original context,
    divide what hardly turns, and blend in between: llama3 linearly in the number of turns, yarn
    in the number of the pair.
    """
    exponent = np.arange(0, head_size, 2, dtype=np.float64) / head_size
    turn = theta**-exponent
    if scaling is not None:
        keep = _kept_share(turn, theta, scaling)
        turn = keep * turn + (1 - keep) * turn / scaling.factor
    return turn.astype(np.float32)


def _kept_share(turn: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray | float:
    """Return how much of each frequency stays: 1 unscaled, 0 divided by `factor`."""
    if scaling.type == "linear":
        return 0.0
    if scaling.type == "llama3":
        periods = scaling.original_max_seq_len * turn / (2 * math.pi)  # in the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        return np.clip((periods - low) / (high - low), 0.0, 1.0)
    head_size = 2 * len(turn)
    first, last = (  # the pair, counted in fractions, that makes so many turns
        head_size * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi), theta) / 2
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_size - 1)
    if first == last:
        last += 0.001
    return 1 - np.clip((np.arange(len(turn)) - first) / (last - first), 0.0, 1.0)


def attention_factor(scaling: RopeScaling | None) -> float:
    """Return what yarn multiplies cosines and sines by: queries and keys grow, weights sharpen."""
    if scaling is None or scaling.type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0


def angles(
    positions_BT: jax.Array, frequency: np.ndarray, factor: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, times `factor`, of each pair at each position, float32 (B, T, H/2)."""
    turn = jnp.asarray(frequency)[None, None, :]
    angle = positions_BT.astype(jnp.float32)[:, :, None] * turn
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rotate(x_BTNH: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate `x` by its position, in float32; dtype of `x`."""
    cos, sin = (a[:, :, None, :] for a in cos_sin)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
