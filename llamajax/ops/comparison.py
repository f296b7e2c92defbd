"""Errors of an operation on a device, in value and gradients, against float64 NumPy."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Of the largest value (forward), of the gradient's norm (backward). float32: a hundred roundings of
# 6e-8 each, or a library's exp and rsqrt; seen on a CPU: 2e-6 at most. bfloat16: some roundings of
# 4e-3, of which most cancel; seen: 5e-3 forward, 8e-3 backward.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}
_STEP = 1e-5  # of the central difference: its error is about the square of it, in float64


def errors(
    function: Callable[..., jax.Array],
    reference: Callable[..., np.ndarray],
    arrays: Sequence[np.ndarray],
    *,
    dtype: str,
    device: Any,
) -> list[float]:
    """Return the error of the value, then that of the gradient by each of `arrays`.

    `function` and `reference` take `arrays`, rounded to the dtype. The derivative is tried along
    one random direction an argument, against the central difference of the reference.
    """
    rng = np.random.RandomState(3)
    rounded = [np.asarray(array).astype(jnp.dtype(dtype)) for array in arrays]
    exact = [array.astype(np.float64) for array in rounded]
    expected = np.asarray(reference(*exact))
    cotangent = rng.standard_normal(expected.shape).astype(jnp.dtype(dtype))

    def value_and_gradients(arrays: list[jax.Array], cotangent: jax.Array) -> tuple:
        out, pull_back = jax.vjp(function, *arrays)
        return out, pull_back(cotangent.astype(out.dtype))

    # float32 means float32, as in llamajax's own steps
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        results = jax.jit(value_and_gradients)(*jax.device_put((rounded, cotangent), device))
    value, grads = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), results)
    found = [np.max(np.abs(value - expected)) / np.max(np.abs(expected))]
    for number, grad in enumerate(grads):
        direction = rng.standard_normal(grad.shape)
        ends = []
        for sign in (1, -1):
            moved = list(exact)
            moved[number] = exact[number] + sign * _STEP * direction
            ends.append(np.sum(reference(*moved) * cotangent.astype(np.float64)))
        slope = (ends[0] - ends[1]) / (2 * _STEP)
        # a gradient of zeros is as wrong as the slope is large
        found.append(abs(np.sum(grad * direction) - slope) / max(np.linalg.norm(grad), abs(slope)))
    return list(map(float, found))
