"""Probes of what the machine is: its facts, its dtypes, and whether it runs at all."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.conformance.outcome import Bench, WrongError

_TRANSFER_BYTES = 64 << 20
_NEEDED_DTYPES = ("float32", "int32", "uint32", "bool")
_OTHER_DTYPES = ("bfloat16", "float16", "int8", "uint8", "float8_e4m3fn", "float8_e5m2")


def program(bench: Bench) -> str:
    """2 x + 1 on every device."""
    begun = time.monotonic()
    double = jax.jit(lambda x: 2 * x + 1)
    x = np.arange(7, dtype=np.float32)
    for device in bench.devices:
        found = np.asarray(double(jax.device_put(x, device)))
        if not np.array_equal(found, 2 * x + 1):
            raise WrongError(f"2 x + 1 for x = {x.tolist()} is {found.tolist()} on {device}")
    return f"compiled, and run on each device, in {time.monotonic() - begun:.2f} s"


def device(bench: Bench) -> str:
    """What the vendor and we need to know of it."""
    first = bench.devices[0]
    kinds = sorted({memory.kind for memory in first.addressable_memories()})
    count = len(bench.devices)
    processes = f", {bench.machine.num_processes} processes" * (bench.machine.num_processes > 1)
    version = " ".join(str(first.client.platform_version).split())
    return (
        f"platform {first.platform}, kind {first.device_kind}, {count} device{'s' * (count > 1)}"
        f"{processes}; version {version or '(none)'}; memories {', '.join(kinds)}"
    )


def dtypes(bench: Bench) -> str:
    """Which dtypes can be stored, added and converted."""
    able, unable = [], []
    for name in (*_NEEDED_DTYPES, *_OTHER_DTYPES):
        x = np.array([[0, 1, 1], [1, 0, 2]]).astype(jnp.dtype(name))
        try:
            found = np.asarray(_added(jax.device_put(x, bench.devices[0])))
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            unable.append(f"{name} ({str(error).splitlines()[0][:80]})")
            continue
        if not np.array_equal(found, x.astype(np.float32) + 1):
            raise WrongError(f"{name}: {x.tolist()} as float32 and 1 added is {found.tolist()}")
        able.append(name)
    if lost := [name for name in _NEEDED_DTYPES if name not in able]:
        raise WrongError(f"not {', '.join(lost)}: {'; '.join(unable)}")
    return ", ".join(able) + (f"; not {'; '.join(unable)}" if unable else "")


@jax.jit
def _added(x: jax.Array) -> jax.Array:
    return jnp.where(x == x, x, x).astype(jnp.float32) + 1


def float64(bench: Bench) -> str:
    """A sum that float32 cannot hold."""
    with jax.enable_x64(True):
        x = jax.device_put(np.float64(2.0**-40), bench.devices[0])
        found = float(jax.jit(lambda x: x + 1.0)(x))
    if found != 1.0 + 2.0**-40:
        raise WrongError("1 + 2**-40 is 1: float64 is computed in fewer bits")
    return "computes in it"


def transfers(bench: Bench) -> str:
    """There and back, the same bytes."""
    sent = np.random.RandomState(1).randint(0, 2**32, _TRANSFER_BYTES // 4, np.uint32)
    begun = time.monotonic()
    there = jax.block_until_ready(jax.device_put(sent, bench.devices[0]))
    half = time.monotonic()
    back = np.array(there)
    ended = time.monotonic()
    if not np.array_equal(sent, back):
        raise WrongError(f"{np.sum(sent != back)} of {sent.size} words came back changed")
    there_s, back_s = max(half - begun, 1e-9), max(ended - half, 1e-9)
    return (
        f"{_TRANSFER_BYTES >> 20} MiB: {_TRANSFER_BYTES / there_s / 1e9:.2f} GB/s to the device, "
        f"{_TRANSFER_BYTES / back_s / 1e9:.2f} GB/s back"
    )
