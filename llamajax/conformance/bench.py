"""What probes share: the devices they run on, their errors, and comparison with a reference."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamajax.ops.comparison import TOLERANCES, errors


class UnsupportedError(Exception):
    """The backend says that it cannot do this, or there is nothing to try it on."""


class WrongError(Exception):
    """The backend did it, and the result is wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """The test bench of a probe: all devices, facts of the machine, a folder of its own.

    found: what the probe adds to the doctor's JSON, beside its result.
    """

    devices: list[Any]
    machine: Any  # backends.Machine
    folder: Path
    found: dict[str, Any] = dataclasses.field(default_factory=dict)

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

    The arguments are those of `ops.comparison.errors`.
    """
    texts = []
    for dtype in dtypes:
        forward, *grads = errors(function, reference, arrays, dtype=dtype, device=bench.devices[0])
        backward = float(np.max(grads))  # NaN is kept
        text = f"{dtype} error {forward:.1e} forward, {backward:.1e} backward"
        limit = TOLERANCES[dtype]
        if not (forward <= limit and backward <= limit):
            raise WrongError(f"{text}; {limit:.0e} is allowed")
        texts.append(text)
    return "; ".join(texts)
