"""Probes of what the machine is: facts, dtypes, memory and its limit, donation, host memory."""

import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.backends import choose_compiler_options
from llamajax.conformance.bench import Bench, UnsupportedError, WrongError

_TRANSFER_BYTES = 64 << 20
_BLOCK_BYTES = 16 << 20
_NEEDED_DTYPES = ("float32", "int32", "uint32", "bool")
_OTHER_DTYPES = ("bfloat16", "float16", "int8", "uint8", "float8_e4m3fn", "float8_e5m2")
_STATE_SHAPES = {"weights": (2048, 1024), "moments": (1023, 517), "scale": (77,)}


def program(bench: Bench) -> str:
    """Compute 2 x + 1 on every device."""
    begun = time.monotonic()
    double = jax.jit(lambda x: 2 * x + 1)
    x = np.arange(7, dtype=np.float32)
    for device in bench.devices:
        found = np.asarray(double(jax.device_put(x, device)))
        if not np.array_equal(found, 2 * x + 1):
            raise WrongError(f"2 x + 1 for x = {x.tolist()} is {found.tolist()} on {device}")
    return f"compiled, and run on each device, in {time.monotonic() - begun:.2f} s"


def compiler_options(bench: Bench) -> str:
    """Choose the compiler's options as a run does, for layers of up to 1 GiB."""
    chosen = choose_compiler_options(
        None, platform=bench.machine.platform, device=bench.devices[0], layer_bytes=0.0
    )
    bench.found["compiler_options"] = {
        "values": dict(chosen.values), "refused": dict(chosen.refused)
    }  # fmt: skip
    values = ", ".join(f"{name}={value}" for name, value in chosen.values.items())
    refused = [f"left out: {name} ({reason})" for name, reason in chosen.refused.items()]
    return "; ".join([values or "none of ours", *refused])


def device(bench: Bench) -> str:
    """Describe the device for a report to the vendor."""
    first, count = bench.devices[0], len(bench.devices)
    kinds = sorted({memory.kind for memory in first.addressable_memories()})
    processes = f", {bench.machine.num_processes} processes" * (bench.machine.num_processes > 1)
    return (
        f"platform {first.platform}, kind {first.device_kind}, {count} device{'s' * (count > 1)}"
        f"{processes}; version {bench.machine.platform_version or '(none)'}; memories "
        f"{', '.join(kinds)}"
    )


def dtypes(bench: Bench) -> str:
    """Store, convert and add in each dtype."""
    able, unable = [], []
    add = jax.jit(lambda x: jnp.where(x == x, x, x).astype(jnp.float32) + 1)
    for name in (*_NEEDED_DTYPES, *_OTHER_DTYPES):
        x = np.array([[0, 1, 1], [1, 0, 2]]).astype(jnp.dtype(name))
        try:
            found = np.asarray(add(bench.put(x)))
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            unable.append(f"{name} ({str(error).splitlines()[0][:80]})")
            continue
        if not np.array_equal(found, x.astype(np.float32) + 1):
            raise WrongError(f"{name}: {x.tolist()} as float32 and 1 added is {found.tolist()}")
        able.append(name)
    if lost := [name for name in _NEEDED_DTYPES if name not in able]:
        raise WrongError(f"not {', '.join(lost)}: {'; '.join(unable)}")
    return ", ".join(able) + (f"; not {'; '.join(unable)}" if unable else "")


def float64(bench: Bench) -> str:
    """Compute a sum that float32 cannot hold."""
    with jax.enable_x64(True):
        found = float(jax.jit(lambda x: x + 1.0)(bench.put(np.float64(2.0**-40))))
    if found != 1.0 + 2.0**-40:
        raise WrongError("1 + 2**-40 is 1: float64 is computed in fewer bits")
    return "computes in it"


def transfers(bench: Bench) -> str:
    """Copy an array to the device and back."""
    sent = np.random.RandomState(1).randint(0, 2**32, _TRANSFER_BYTES // 4, np.uint32)
    begun = time.monotonic()
    there = jax.block_until_ready(bench.put(sent))
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


def _memory_stats(device: jax.Device) -> dict[str, int]:
    return device.memory_stats() or {}


def memory_stats(bench: Bench) -> str:
    """Read the limit and the use, and check that use follows what is allocated."""
    first = bench.devices[0]
    stats = _memory_stats(first)
    if "bytes_in_use" not in stats:
        raise UnsupportedError("the backend does not report its memory")
    block = jax.block_until_ready(bench.put(np.zeros(_BLOCK_BYTES, np.uint8)))
    grown = _memory_stats(first)["bytes_in_use"] - stats["bytes_in_use"]
    if not block.nbytes <= grown <= 2 * block.nbytes:
        raise WrongError(f"bytes_in_use grew by {grown} for an array of {block.nbytes} bytes")
    limit = stats.get("bytes_limit")
    shown = f"limit {limit / 2**30:.2f} GiB" if limit else "limit unknown"
    return f"{shown}; use follows what is allocated"


def out_of_memory(bench: Bench) -> str:
    """Ask for an array larger than the memory; it is refused, and the device goes on."""
    limit = _memory_stats(bench.devices[0]).get("bytes_limit")
    if not limit:
        raise UnsupportedError("its limit is not known")
    size = int(limit * 1.5) // 4
    x = bench.put(np.float32(1))
    try:
        jax.block_until_ready(jax.jit(lambda x: jnp.broadcast_to(x, (size,)) + 0)(x))
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
    else:
        raise WrongError(f"an array of {4 * size} bytes was given, more than its limit")
    if float(x + 1) != 2.0:
        raise WrongError("after a refusal 1 + 1 is not 2")
    return f"refused as an error, and the device goes on: {reason}"


def donation(bench: Bench) -> str:
    """Update a state in its own memory; count aliased bytes and bytes in use."""
    device = bench.devices[0]
    start = {
        name: np.random.RandomState(6).standard_normal(shape).astype(np.float32)
        for name, shape in _STATE_SHAPES.items()
    }
    size = sum(x.nbytes for x in start.values())
    # copied on the device: what comes from the host may be in the host's own memory
    state = jax.jit(lambda s: jax.tree.map(jnp.copy, s))(bench.put(start))
    before = _memory_stats(device).get("bytes_in_use")
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*donated buffers were not usable")
        compiled = update.lower(state).compile()
    after = jax.block_until_ready(compiled(state))
    if not bench.machine.donates:
        raise UnsupportedError(f"JAX does not donate on platform {device.platform}")
    if not all(x.is_deleted() for x in jax.tree.leaves(state)):
        raise WrongError("the backend ignores donation: a step holds its state twice")
    for name, x in start.items():
        if not np.array_equal(np.asarray(after[name]), x * 2 + 1):
            raise WrongError(f"{name} is wrong after an update of donated memory")
    texts = []
    analysis = compiled.memory_analysis()
    if analysis is not None:
        aliased = analysis.alias_size_in_bytes
        texts.append(f"{aliased} of {size} bytes aliased")
        if aliased < size:
            raise WrongError(f"only {texts[0]}: a step holds its state twice")
    if before is not None:
        grown = _memory_stats(device)["bytes_in_use"] - before
        texts.append(f"memory in use grew by {max(0, grown)} bytes")
        if grown > size // 2:
            raise WrongError(f"{', '.join(texts)}: the donated memory was not given back")
    return ", ".join(texts) or "donated arrays are gone; the backend reports no bytes"


def host_offload(bench: Bench) -> str:
    """Keep moments in pinned host memory between steps, as `optim.offload` does."""
    device = bench.devices[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if "pinned_host" not in kinds:
        raise UnsupportedError(f"memories are {', '.join(sorted(kinds))}; no pinned_host")
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")

    def step(x: jax.Array) -> jax.Array:
        x = jax.device_put(x, jax.memory.Space.Device) + 1
        return jax.device_put(x, jax.memory.Space.Host)

    x = np.arange(1013, dtype=np.float32)
    out = jax.jit(step, out_shardings=host)(jax.device_put(x, host))
    if out.sharding.memory_kind != "pinned_host":
        raise WrongError(f"the result is in {out.sharding.memory_kind}, not in pinned_host")
    if not np.array_equal(np.asarray(out), x + 1):
        raise WrongError("values changed on the way to the host and back")
    return "stored in pinned_host, computed on the device"
