"""Prints how long attention takes, forward and backward, for each implementation that runs here.

    python benchmarks/attention.py --shape=4,512,8,4,64 --dtypes=float32,bfloat16 \\
        [--own=module:function]

The shape is B,T,N,K,H: rows, tokens, query heads, key-value heads, head size. Implementations
alternate within one run, so that a busy machine slows all of them alike; median and least of
`--repeats` calls, and the temporary memory of the compiled program.
"""

import argparse
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.ops.attention import SUPPORTED, attention, check_supported


def compiled_step(impl: str, arguments: tuple[jax.Array, ...]):
    """The compiled value and gradients of one implementation."""

    def value_and_grads(q, k, v, segment_ids):
        o, pull = jax.vjp(
            lambda *qkv: attention(*qkv, impl=impl, segment_ids_BT=segment_ids), q, k, v
        )
        return o, *pull(o)

    return jax.jit(value_and_grads).lower(*arguments).compile()


def inputs(shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, ...]:
    """Random q, k, v and the ids of four documents a row."""
    B, T, N, K, H = shape
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.standard_normal((B, T, n, H)), dtype) for n in (N, K, K)]
    ids = np.sort(rng.integers(1, 5, (B, T)), axis=1)
    return *qkv, jnp.asarray(ids, jnp.int32)


def measure(shape: tuple[int, ...], dtype: str, repeats: int, impls: Sequence[str]) -> None:
    """Print the rows of one dtype."""
    _, T, _, _, H = shape
    facts = {"platform": jax.default_backend(), "dtype": dtype, "head_size": H, "seq_len": T}
    arguments = inputs(shape, dtype)
    steps = {i: compiled_step(i, arguments) for i in impls if not check_supported(i, **facts)}
    times: dict[str, list[float]] = {impl: [] for impl in steps}
    for repeat in range(repeats + 1):
        for impl, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*arguments))
            if repeat:  # the first call warms up
                times[impl].append((time.perf_counter() - start) * 1e3)
    for impl, taken in times.items():
        memory = steps[impl].memory_analysis().temp_size_in_bytes / 2**20
        median, least = np.median(taken), min(taken)
        print(f"| {dtype} | {impl} | {median:.1f} | {least:.1f} | {memory:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4,512,8,4,64", help="B,T,N,K,H")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--own", help="also this function, as train.attention takes it")
    flags = parser.parse_args()
    shape = tuple(int(size) for size in flags.shape.split(","))
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}, B,T,N,K,H = {flags.shape}, forward + backward\n")
    print("| dtype | implementation | median ms | least ms | temporary MiB |")
    print("| --- | --- | ---: | ---: | ---: |")
    for dtype in flags.dtypes.split(","):
        measure(shape, dtype, flags.repeats, [*SUPPORTED, *filter(None, [flags.own])])


if __name__ == "__main__":
    main()
