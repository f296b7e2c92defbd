"""Prints how long attention takes, forward and backward, for each implementation that runs here.

    python benchmarks/attention.py --shape=4,512,8,4,64 --dtypes=float32,bfloat16 \\
        [--own=module:function]

The shape is B,T,N,K,H: rows, tokens, query heads, key-value heads, head size. Implementations
alternate within one run, so that a busy machine slows all of them alike; median and least of
`--repeats` calls, and the temporary memory of the compiled program.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.config import Flags, key, parse_command_line
from llamajax.ops.attention import SUPPORTED, attention, check_supported
from llamajax.verbs import run_verb


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionFlags(Flags):
    """Flags of this script."""

    shape: tuple[int, ...] = key("B,T,N,K,H", default=(4, 512, 8, 4, 64))
    dtypes: tuple[str, ...] = key("a,b", default=("float32", "bfloat16"))
    repeats: int = key("calls that are timed", default=20, at_least=1)
    own: str | None = key("also this function, as train.attention takes it", default=None)


def value_and_grads(impl: str) -> Callable[..., tuple[jax.Array, ...]]:
    """Return a function of q, k, v, ids and the output's gradient, which is the output if None."""

    def both(q, k, v, ids, do=None):
        o, pull = jax.vjp(lambda *qkv: attention(*qkv, impl=impl, segment_ids_BT=ids), q, k, v)
        return o, *pull(o if do is None else do)

    return both


def inputs(shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, ...]:
    """Random q, k, v and the ids of four documents a row."""
    B, T, N, K, H = shape
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.standard_normal((B, T, n, H)), dtype) for n in (N, K, K)]
    ids = np.sort(rng.integers(1, 5, (B, T)), axis=1)
    return *qkv, jnp.asarray(ids, jnp.int32)


def measure(flags: AttentionFlags, dtype: str) -> None:
    """Print the rows of one dtype."""
    _, T, _, _, H = flags.shape
    facts = {"platform": jax.default_backend(), "dtype": dtype, "head_size": H, "seq_len": T}
    arrays = inputs(flags.shape, dtype)
    steps: dict[str, Any] = {}
    for impl in [*SUPPORTED, *filter(None, [flags.own])]:
        if not check_supported(impl, **facts):
            steps[impl] = jax.jit(value_and_grads(impl)).lower(*arrays).compile()
    times: dict[str, list[float]] = {impl: [] for impl in steps}
    for repeat in range(flags.repeats + 1):
        for impl, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*arrays))
            if repeat:  # the first call warms up
                times[impl].append((time.perf_counter() - start) * 1e3)
    for impl, taken in times.items():
        memory = steps[impl].memory_analysis().temp_size_in_bytes / 2**20
        median, least = np.median(taken), min(taken)
        print(f"| {dtype} | {impl} | {median:.1f} | {least:.1f} | {memory:.0f} |")


def main(argv: list[str]) -> None:
    """Print one table."""
    flags = parse_command_line(argv, AttentionFlags, verb="benchmarks/attention.py", doc=__doc__)
    device, shape = jax.devices()[0].device_kind, ",".join(map(str, flags.shape))
    print(f"jax {jax.__version__}, {device}, B,T,N,K,H = {shape}, forward + backward\n")
    print("| dtype | implementation | median ms | least ms | temporary MiB |")
    print("| --- | --- | ---: | ---: | ---: |")
    for dtype in flags.dtypes:
        measure(flags, dtype)


if __name__ == "__main__":
    run_verb(main)
