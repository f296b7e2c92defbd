"""Probes of collectives: each on every mesh axis, with values that tell who sent what."""

import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamajax import sharding
from llamajax.config.schema import MeshConfig
from llamajax.conformance.bench import Bench, UnsupportedError, WrongError
from llamajax.sharding import AXES, collectives

_ROWS, _COLUMNS = 5, 24  # of a block whose values are checked; columns times the axis' size
_WIDTH = 1024  # float32 values in a row of a block that is timed
_BLOCK_BYTES = (1 << 20, 8 << 20, 64 << 20)
_LONG_ENOUGH_S = 1e-3
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
                _check(mesh, axis, function, expected, dtype=dtype)
            if sent is not None:
                rate = sent(size) * _bytes_per_s(mesh, axis, function) / 1e9
                name = f"{axis} {size}"
                rates[name] = min(rate, rates.get(name, rate))
    return "right on " + ", ".join(f"{name}: {rate:.2g} GB/s" for name, rate in rates.items())


def _check(mesh: Mesh, axis: str, function: Callable, expected: Callable, *, dtype: str) -> None:
    """Raise WrongError where a value is wrong."""
    placed = _placed(mesh)
    sizes = tuple(mesh.shape[a] for a in mesh.axis_names if mesh.shape[a] > 1)
    rows, columns = _ROWS, _COLUMNS * mesh.shape[axis]
    blocks = _blocks(sizes, rows, columns)
    x = jax.device_put(blocks.reshape(-1, columns).astype(jnp.dtype(dtype)), placed)
    found = np.asarray(_moved(mesh, axis, function)(x)).astype(np.float64)
    where = [a for a in mesh.axis_names if mesh.shape[a] > 1].index(axis)
    front = np.moveaxis(blocks, where, 0)
    wanted = expected(front.reshape(front.shape[0], -1, rows, columns))
    wanted = wanted.reshape(*front.shape[: len(sizes)], *wanted.shape[2:])
    wanted = np.moveaxis(wanted, 0, where).reshape(-1, wanted.shape[-1])
    name = f"wrong over {axis} on {sharding.describe(mesh)} in {dtype}"
    if found.shape != wanted.shape:
        raise WrongError(f"{name}: {found.shape} values instead of {wanted.shape}")
    if not np.array_equal(found, wanted):
        bad = tuple(np.argwhere(found != wanted)[0])
        raise WrongError(
            f"{name}: {np.sum(found != wanted)} of {wanted.size} values, for example "
            f"{found[bad]:g} instead of {wanted[bad]:g}"
        )


def _bytes_per_s(mesh: Mesh, axis: str, function: Callable) -> float:
    """Bytes of a device's block over the time of a call, of blocks as large as it takes."""
    moved = _moved(mesh, axis, function)
    for size in _BLOCK_BYTES:
        rows = size // 4 // _WIDTH * mesh.size
        columns = _WIDTH - _WIDTH % mesh.shape[axis]
        x = jnp.ones((rows, columns), jnp.float32, device=_placed(mesh))
        jax.block_until_ready(moved(x))
        best = min(_timed(moved, x) for _ in range(_REPEATS))
        if best > _LONG_ENOUGH_S:
            break
    return x.nbytes / mesh.size / best


def _placed(mesh: Mesh) -> NamedSharding:
    """Rows over all devices, in the order of the mesh."""
    return NamedSharding(mesh, PartitionSpec(tuple(a for a in AXES if mesh.shape[a] > 1)))


def _moved(mesh: Mesh, axis: str, function: Callable) -> Callable:
    spec = _placed(mesh).spec
    return jax.jit(
        jax.shard_map(
            lambda x: function(x, axis), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
    )


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
