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

    With `scaling`, as in Llama 3.1, wavelengths that fit often into the original context stay,
    those that do not fit are slowed by `factor`, and those in between are blended linearly.
    """
    exponent = np.arange(0, head_size, 2, dtype=np.float64) / head_size
    turn = theta**-exponent
    if scaling is not None:
        periods = scaling.original_max_seq_len * turn / (2 * math.pi)  # in the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((periods - low) / (high - low), 0.0, 1.0)
        turn = keep * turn + (1 - keep) * turn / scaling.factor
    return turn.astype(np.float32)


def angles(positions_BT: jax.Array, frequency: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angle of each pair at each position, float32 (B, T, H/2)."""
    turn = jnp.asarray(frequency)[None, None, :]
    angle = positions_BT.astype(jnp.float32)[:, :, None] * turn
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTNH: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate `x` by its position, in float32; dtype of `x`."""
    cos, sin = (a[:, :, None, :] for a in cos_sin)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
