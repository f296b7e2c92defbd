"""Probes of collectives: each on every mesh axis, with values that tell who sent what."""

import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from llamajax import sharding
from llamajax.config.schema import MeshConfig
from llamajax.conformance.outcome import Bench, UnsupportedError, WrongError
from llamajax.sharding import AXES, collectives

_WIDTH = 1024  # float32 values in a row of a device's block
_BYTES = 1 << 20  # of a device's block, for the speed
_REPEATS = 3
# The largest integer below which bfloat16 has them all: sums are then exact in any order.
_EXACT = 256

Blocks = np.ndarray  # (members of the axis, the others, rows, columns)


def all_reduce(bench: Bench) -> str:
    """Sum and maximum."""
    _tried(bench, lambda x, axis: collectives.largest(x, axis), _largest, sent=None)
    return _tried(
        bench,
        lambda x, axis: collectives.total(x, axis),
        lambda blocks: np.broadcast_to(blocks.sum(axis=0), blocks.shape),
        sent=lambda n: 2 * (n - 1) / n,
    )


def all_gather(bench: Bench) -> str:
    """Rows of all members joined."""
    return _tried(
        bench,
        lambda x, axis: collectives.all_gathered(x, axis, dim=0),
        lambda blocks: np.stack([np.concatenate(blocks, axis=1)] * len(blocks)),
        sent=lambda n: n - 1,
    )


def reduce_scatter(bench: Bench) -> str:
    """The sum, of which each member keeps its columns."""
    return _tried(
        bench,
        lambda x, axis: collectives.sum_scattered(x, axis, dim=1),
        lambda blocks: np.stack(np.split(blocks.sum(axis=0), len(blocks), axis=2)),
        sent=lambda n: (n - 1) / n,
    )


def all_to_all(bench: Bench) -> str:
    """Columns dealt out, rows put together."""
    return _tried(
        bench,
        lambda x, axis: collectives.exchanged(x, axis, split=1, join=0),
        lambda blocks: np.stack(
            [np.concatenate(part, axis=1) for part in np.split(blocks, len(blocks), axis=3)]
        ),
        sent=lambda n: (n - 1) / n,
    )


def permute(bench: Bench) -> str:
    """What the member before has, and in the other direction."""
    _tried(
        bench,
        lambda x, axis: collectives.passed(x, axis, by=-1),
        lambda blocks: np.roll(blocks, -1, axis=0),
        sent=None,
    )
    return _tried(
        bench,
        lambda x, axis: collectives.passed(x, axis, by=1),
        lambda blocks: np.roll(blocks, 1, axis=0),
        sent=lambda n: 1,
    )


def _largest(blocks: Blocks) -> Blocks:
    return np.broadcast_to(blocks.max(axis=0), blocks.shape)


def layouts(count: int) -> list[dict[str, int]]:
    """Meshes on which every axis has devices, near ones and distant ones, and all at once."""
    factors, rest = [], count
    for prime in (2, 3, 5, 7):
        while rest % prime == 0 and len(factors) < 2 and rest > prime:
            factors.append(prime)
            rest //= prime
    factors.append(rest)
    size = len(factors)
    starts = sorted({*range(0, len(AXES) - size, size), len(AXES) - size}) if size > 1 else []
    split = [dict(zip(AXES[i : i + size], factors, strict=True)) for i in starts]
    return [{"fsdp": count}, *split]


def _tried(
    bench: Bench,
    function: Callable[[jax.Array, str], jax.Array],
    expected: Callable[[Blocks], Blocks],
    *,
    sent: Callable[[int], float] | None,
) -> str:
    """Right on every axis of every layout, in two dtypes; and how fast, where `sent` says how much.

    `sent`: share of its block that each of n members has to send at least.
    """
    if len(bench.devices) == 1:
        raise UnsupportedError("one device: there is nobody to exchange anything with")
    rates: dict[str, float] = {}
    for sizes in layouts(len(bench.devices)):
        mesh = sharding.build_mesh(MeshConfig(**sizes), bench.devices)
        for axis, size in sizes.items():
            for dtype in ("bfloat16", "float32"):
                large = dtype == "float32" and sent is not None
                seconds = _run(mesh, axis, function, expected, dtype=dtype, large=large)
            if sent is not None:
                rate = sent(size) * _BYTES / seconds / 1e9
                name = f"{axis} {size}"
                rates[name] = min(rate, rates.get(name, rate))
    return "right on " + ", ".join(f"{name}: {rate:.2g} GB/s" for name, rate in rates.items())


def _run(
    mesh: Mesh, axis: str, function: Callable, expected: Callable, *, dtype: str, large: bool
) -> float:
    """Seconds of one call; WrongError where a value is wrong."""
    used = tuple(a for a in mesh.axis_names if mesh.shape[a] > 1)
    sizes = tuple(mesh.shape[a] for a in used)
    columns = _WIDTH if large else 8 * mesh.shape[axis]
    columns -= columns % mesh.shape[axis]
    rows = _BYTES // 4 // columns if large else 3
    blocks = _blocks(sizes, rows, columns)
    spec = PartitionSpec(used)
    moved = jax.jit(
        jax.shard_map(
            lambda x: function(x, axis), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
    )
    x = blocks.reshape(-1, columns).astype(jnp.dtype(dtype))
    x = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    found = np.asarray(moved(x)).astype(np.float64)
    where = used.index(axis)
    front = np.moveaxis(blocks, where, 0)
    flat = front.reshape(front.shape[0], -1, rows, columns)
    wanted = expected(flat)
    wanted = wanted.reshape(*front.shape[: len(sizes)], *wanted.shape[2:])
    wanted = np.moveaxis(wanted, 0, where).reshape(-1, wanted.shape[-1])
    if found.shape != wanted.shape or not np.array_equal(found, wanted):
        bad = np.argwhere(found != wanted)[0] if found.shape == wanted.shape else None
        told = f"{found.shape} values instead of {wanted.shape}"
        if bad is not None:
            told = (
                f"{np.sum(found != wanted)} of {wanted.size} values, for example "
                f"{found[tuple(bad)]:g} instead of {wanted[tuple(bad)]:g}"
            )
        raise WrongError(
            f"wrong over {axis} of {dict(zip(used, sizes, strict=True))} in {dtype}: {told}"
        )
    return min(_timed(moved, x) for _ in range(_REPEATS)) if large else math.nan


def _blocks(sizes: tuple[int, ...], rows: int, columns: int) -> np.ndarray:
    """A different block of small integers a device, (*sizes, rows, columns)."""
    count = math.prod(sizes)
    limit = max(1, _EXACT // count)
    drawn = np.random.RandomState(5).randint(-limit, limit + 1, (count, rows, columns))
    return drawn.astype(np.float64).reshape(*sizes, rows, columns)


def _timed(function: Callable, x: jax.Array) -> float:
    begun = time.monotonic()
    jax.block_until_ready(function(x))
    return time.monotonic() - begun
