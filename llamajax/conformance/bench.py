"""What probes share: the devices they run on, their errors, and comparison with a reference."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Of the largest value (forward), of the gradient's norm (backward). float32: a hundred roundings of
# 6e-8 each, or a library's exp and rsqrt; seen on a CPU: 2e-6 at most. bfloat16: some roundings of
# 4e-3, of which most cancel; seen: 5e-3 forward, 8e-3 backward.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}
_STEP = 1e-5  # of the central difference: its error is about the square of it, in float64


class UnsupportedError(Exception):
    """The backend says that it cannot do this, or there is nothing to try it on."""


class WrongError(Exception):
    """The backend did it, and the result is wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """The test bench of a probe: all devices, facts of the machine, a folder of its own."""

    devices: list[Any]
    machine: Any  # backends.Machine
    folder: Path

    def put(self, tree: Any) -> Any:
        """Copy arrays to the first device."""
        return jax.device_put(tree, self.devices[0])


def best_time_s(function: Callable[[Any], Any], x: Any) -> float:
    """Return the shortest of three calls, compiled before."""
    times = []
    for _ in range(4):
        begun = time.monotonic()
        jax.block_until_ready(function(x))
        times.append(time.monotonic() - begun)
    return min(times[1:])


def compare(
    bench: Bench,
    function: Callable[..., jax.Array],
    reference: Callable[..., np.ndarray],
    arrays: Sequence[np.ndarray],
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> str:
    """Return the largest errors by dtype, in words; WrongError where one is too large.

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
    """Return the errors of the value and of the gradients on the device."""
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
        results = jax.jit(value_and_gradients)(*bench.put((rounded, cotangent)))
    found, grads = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), results)
    forward = np.max(np.abs(found - expected)) / np.max(np.abs(expected))
    backward = 0.0
    for number, grad in enumerate(grads):
        direction = rng.standard_normal(grad.shape)
        ends = []
        for sign in (1, -1):
            moved = list(exact)
            moved[number] = exact[number] + sign * _STEP * direction
            ends.append(np.sum(reference(*moved) * cotangent.astype(np.float64)))
        slope = (ends[0] - ends[1]) / (2 * _STEP)
        # a gradient of zeros is as wrong as the slope is large
        error = abs(np.sum(grad * direction) - slope) / max(np.linalg.norm(grad), abs(slope))
        backward = error if not error <= backward else backward  # NaN is kept
    return float(forward), float(backward)
