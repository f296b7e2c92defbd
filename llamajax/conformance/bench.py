"""What a probe works with, and its two ways of saying no; what it says is a `backends.Probe`."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class UnsupportedError(Exception):
    """The backend says that it cannot do this; or there is nothing to try it on."""


class WrongError(Exception):
    """The backend did it, and the result is wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What a probe works with. devices: all of the backend's; folder: to write into, removed."""

    devices: list[Any]
    machine: Any  # backends.Machine
    folder: Path


# Of the largest value (forward), of the gradient's norm (backward). float32: a hundred roundings of
# 6e-8 each, or a library's exp and rsqrt; seen on a CPU: 2e-6 at most. bfloat16: some roundings of
# 4e-3, of which most cancel; seen: 5e-3 forward, 8e-3 backward.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}
_STEP = 1e-5  # of the central difference: its error is about the square of it, in float64


def compare(
    bench: Bench,
    function: Callable[..., jax.Array],
    reference: Callable[..., np.ndarray],
    arrays: Sequence[np.ndarray],
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> str:
    """The largest errors by dtype, in words; WrongError where one is too large.

    `function` and `reference` take `arrays`, rounded to the dtype. The derivative is tried along
    one random direction an argument, against the central difference of the reference.
    """
    texts = []
    for dtype in dtypes:
        forward, backward = _errors(bench, function, reference, arrays, dtype=dtype)
        text = f"{dtype} error {forward:.1e} forward, {backward:.1e} backward"
        limit = TOLERANCES[dtype]
        if not (forward <= limit and backward <= limit):
            raise WrongError(f"{text}; {limit:.0e} is allowed")
        texts.append(text)
    return "; ".join(texts)


def _errors(bench: Bench, function, reference, arrays, *, dtype: str) -> tuple[float, float]:
    rng = np.random.RandomState(3)
    rounded = [np.asarray(array).astype(jnp.dtype(dtype)) for array in arrays]
    exact = [array.astype(np.float64) for array in rounded]
    expected = np.asarray(reference(*exact))
    pull = rng.standard_normal(expected.shape).astype(jnp.dtype(dtype))
    found, grads = _device_results(bench, function, rounded, pull, dtype=dtype)
    forward = np.max(np.abs(found - expected)) / np.max(np.abs(expected))
    backward = 0.0
    for number, grad in enumerate(grads):
        way = rng.standard_normal(grad.shape)
        ends = []
        for sign in (1, -1):
            moved = list(exact)
            moved[number] = exact[number] + sign * _STEP * way
            ends.append(np.sum(reference(*moved) * pull.astype(np.float64)))
        slope = (ends[0] - ends[1]) / (2 * _STEP)
        # a gradient of zeros is as wrong as the slope is large
        error = abs(np.sum(grad * way) - slope) / np.maximum(np.linalg.norm(grad), abs(slope))
        backward = error if not error <= backward else backward  # NaN is kept
    return float(forward), float(backward)


def _device_results(bench: Bench, function, arrays, pull, *, dtype: str) -> tuple[Any, list[Any]]:
    def both(arrays: list[jax.Array], pull: jax.Array) -> tuple[jax.Array, Any]:
        out, back = jax.vjp(function, *arrays)
        return out, back(pull.astype(out.dtype))

    # float32 means float32, as in llamajax's own steps
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        found, grads = jax.jit(both)(*jax.device_put((arrays, pull), bench.devices[0]))
    wide = lambda x: np.asarray(x).astype(np.float64)  # noqa: E731
    return wide(found), [wide(grad) for grad in grads]
