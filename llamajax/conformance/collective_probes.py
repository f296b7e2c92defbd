"""Probes of collectives: each on every mesh axis, with values that tell who sent what."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llamajax import sharding
from llamajax.config.schema import MeshConfig
from llamajax.conformance.bench import Bench, UnsupportedError, WrongError, best_time_s
from llamajax.sharding import AXES, collectives

_ROWS, _COLUMNS = 5, 24  # of a block whose values are checked; columns times the axis' size
_WIDTH = 1024  # float32 values in a row of a block that is timed
_BLOCK_BYTES = (1 << 20, 8 << 20, 64 << 20)
_LONG_ENOUGH_S = 1e-3
# The largest integer below which bfloat16 has them all: sums are then exact in any order.
_EXACT = 256

Blocks = np.ndarray  # (members of the axis, the others, rows, columns)


def all_reduce(bench: Bench) -> str:
    """Take the sum and the maximum."""
    on_every_axis(
        bench, collectives.pmax, lambda blocks: np.broadcast_to(blocks.max(axis=0), blocks.shape)
    )
    return on_every_axis(
        bench,
        collectives.psum,
        lambda blocks: np.broadcast_to(blocks.sum(axis=0), blocks.shape),
        sent=lambda n: 2 * (n - 1) / n,
    )


def all_gather(bench: Bench) -> str:
    """Join the rows of all members."""
    return on_every_axis(
        bench,
        functools.partial(collectives.all_gather, dim=0),
        lambda blocks: np.stack([np.concatenate(blocks, axis=1)] * len(blocks)),
        sent=lambda n: n - 1,
    )


def reduce_scatter(bench: Bench) -> str:
    """Sum, and keep each member's columns."""
    return on_every_axis(
        bench,
        functools.partial(collectives.psum_scatter, dim=1),
        lambda blocks: np.stack(np.split(blocks.sum(axis=0), len(blocks), axis=2)),
        sent=lambda n: (n - 1) / n,
    )


def all_to_all(bench: Bench) -> str:
    """Deal out columns, and join rows."""
    return on_every_axis(
        bench,
        functools.partial(collectives.all_to_all, split=1, join=0),
        lambda blocks: np.stack(
            [np.concatenate(part, axis=1) for part in np.split(blocks, len(blocks), axis=3)]
        ),
        sent=lambda n: (n - 1) / n,
    )


def permute(bench: Bench) -> str:
    """Receive from the next member and from the one before."""
    on_every_axis(
        bench,
        functools.partial(collectives.ppermute, by=-1),
        lambda blocks: np.roll(blocks, -1, axis=0),
    )
    return on_every_axis(
        bench,
        functools.partial(collectives.ppermute, by=1),
        lambda blocks: np.roll(blocks, 1, axis=0),
        sent=lambda n: 1,
    )


def layouts(count: int) -> list[dict[str, int]]:
    """Return meshes on which every axis has devices, near ones, distant ones, and all of them."""
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


def on_every_axis(
    bench: Bench,
    collective: Callable[[jax.Array, str], jax.Array],
    expected: Callable[[Blocks], Blocks],
    *,
    sent: Callable[[int], float] | None = None,
) -> str:
    """Check a collective on every axis of every layout in two dtypes, and time it.

    `sent`: share of its block that each of n members has to send at least; None: not timed.
    """
    if len(bench.devices) == 1:
        raise UnsupportedError("one device: there is nobody to exchange anything with")
    rates: dict[str, float] = {}
    for sizes in layouts(len(bench.devices)):
        mesh = sharding.build_mesh(MeshConfig(**sizes), bench.devices)
        rows = NamedSharding(mesh, PartitionSpec(tuple(a for a in AXES if mesh.shape[a] > 1)))
        for axis, size in sizes.items():
            # of one device's block, for arrays whose rows are split over the mesh
            function = functools.partial(collective, axis=axis)
            specs = {"in_specs": rows.spec, "out_specs": rows.spec}
            run = jax.jit(jax.shard_map(function, mesh=mesh, **specs, check_vma=False))
            for dtype in ("bfloat16", "float32"):
                _check(rows, axis, run, expected, dtype=dtype)
            if sent is not None:
                rate = sent(size) * _bytes_per_s(rows, axis, run) / 1e9
                name = f"{axis} {size}"
                rates[name] = min(rate, rates.get(name, rate))
    return "right on " + ", ".join(f"{name}: {rate:.2g} GB/s" for name, rate in rates.items())


def _check(
    rows: NamedSharding, axis: str, run: Callable, expected: Callable, *, dtype: str
) -> None:
    """Raise WrongError where a value is wrong."""
    mesh = rows.mesh
    split = {a: mesh.shape[a] for a in mesh.axis_names if mesh.shape[a] > 1}
    columns = _COLUMNS * mesh.shape[axis]
    # a different block of small integers a device
    limit = max(1, _EXACT // mesh.size)
    shape = (mesh.size * _ROWS, columns)
    values = np.random.RandomState(5).randint(-limit, limit + 1, shape).astype(np.float64)
    x = jax.device_put(values.astype(jnp.dtype(dtype)), rows)
    found = np.asarray(run(x)).astype(np.float64)
    number = list(split).index(axis)
    blocks = np.moveaxis(values.reshape(*split.values(), _ROWS, columns), number, 0)
    wanted = expected(blocks.reshape(len(blocks), -1, _ROWS, columns))
    wanted = wanted.reshape(*blocks.shape[: len(split)], *wanted.shape[2:])
    wanted = np.moveaxis(wanted, 0, number).reshape(-1, wanted.shape[-1])
    name = f"wrong over {axis} on {sharding.describe(mesh)} in {dtype}"
    if found.shape != wanted.shape:
        raise WrongError(f"{name}: {found.shape} values instead of {wanted.shape}")
    if not np.array_equal(found, wanted):
        bad = tuple(np.argwhere(found != wanted)[0])
        raise WrongError(
            f"{name}: {np.sum(found != wanted)} of {wanted.size} values, for example "
            f"{found[bad]:g} instead of {wanted[bad]:g}"
        )


def _bytes_per_s(rows: NamedSharding, axis: str, run: Callable) -> float:
    """Return bytes of a device's block over the time of a call, of blocks as large as it takes."""
    mesh = rows.mesh
    columns = _WIDTH - _WIDTH % mesh.shape[axis]
    for size in _BLOCK_BYTES:
        x = jnp.ones((size // 4 // _WIDTH * mesh.size, columns), jnp.float32, device=rows)
        best_s = best_time_s(run, x)
        if best_s > _LONG_ENOUGH_S:
            break
    return x.nbytes / mesh.size / best_s
