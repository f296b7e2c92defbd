"""Probes of memory: what is told of it, its limit, its reuse, and the host's as its extension."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.conformance.outcome import Bench, UnsupportedError, WrongError

_BLOCK_BYTES = 16 << 20
_STATE_SHAPES = {"weights": (2048, 1024), "moments": (1023, 517), "scale": (77,)}


def memory_stats(bench: Bench) -> str:
    """Limit and use, and that use follows what is allocated."""
    first = bench.devices[0]
    stats = first.memory_stats()
    if not stats or "bytes_in_use" not in stats:
        raise UnsupportedError("the backend tells nothing of its memory")
    block = jax.block_until_ready(jax.device_put(np.zeros(_BLOCK_BYTES, np.uint8), first))
    grown = first.memory_stats()["bytes_in_use"] - stats["bytes_in_use"]
    if not block.nbytes <= grown <= 2 * block.nbytes:
        raise WrongError(f"bytes_in_use grew by {grown} for an array of {block.nbytes} bytes")
    limit = stats.get("bytes_limit")
    told = f"limit {limit / 2**30:.2f} GiB" if limit else "limit not told"
    return f"{told}; use follows what is allocated"


def out_of_memory(bench: Bench) -> str:
    """An array larger than the memory is refused, and the device goes on."""
    limit = (bench.devices[0].memory_stats() or {}).get("bytes_limit")
    if not limit:
        raise UnsupportedError("its limit is not known")
    size = int(limit * 1.5) // 4
    x = jax.device_put(np.float32(1), bench.devices[0])
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
    """A state updated in the memory where it lies: aliased bytes, and bytes in use."""
    device = bench.devices[0]
    start = {
        name: np.random.RandomState(6).standard_normal(shape).astype(np.float32)
        for name, shape in _STATE_SHAPES.items()
    }
    size = sum(x.nbytes for x in start.values())
    # copied on the device: what comes from the host may lie in the host's own memory
    state = jax.jit(lambda s: jax.tree.map(jnp.copy, s))(jax.device_put(start, device))
    before = _in_use(device)
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*donated buffers were not usable")
        compiled = update.lower(state).compile()
    after = jax.block_until_ready(compiled(state))
    if not bench.machine.donates:
        raise UnsupportedError(f"JAX does not donate on platform {device.platform}")
    if not all(x.is_deleted() for x in jax.tree.leaves(state)):
        raise WrongError("the backend ignores donation: a state lives twice in a step")
    for name, x in start.items():
        if not np.array_equal(np.asarray(after[name]), x * 2 + 1):
            raise WrongError(f"{name} is wrong after an update of donated memory")
    texts = []
    analysis = compiled.memory_analysis()
    if analysis is not None:
        aliased = analysis.alias_size_in_bytes
        texts.append(f"{aliased} of {size} bytes aliased")
        if aliased < size:
            raise WrongError(f"only {texts[0]}: a state lives twice in a step")
    if before is not None:
        grown = _in_use(device) - before
        texts.append(f"memory in use grew by {max(0, grown)} bytes")
        if grown > size // 2:
            raise WrongError(f"{', '.join(texts)}: the donated memory was not given back")
    return ", ".join(texts) or "donated arrays are gone; the backend tells no bytes"


def _in_use(device: jax.Device) -> int | None:
    return (device.memory_stats() or {}).get("bytes_in_use")


def host_offload(bench: Bench) -> str:
    """Moments that rest in pinned host memory between steps, as `optim.offload` does it."""
    device = bench.devices[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if "pinned_host" not in kinds:
        raise UnsupportedError(f"memories are {', '.join(sorted(kinds))}; no pinned_host")
    away = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")

    def step(x: jax.Array) -> jax.Array:
        x = jax.device_put(x, jax.memory.Space.Device) + 1
        return jax.device_put(x, jax.memory.Space.Host)

    x = np.arange(1013, dtype=np.float32)
    out = jax.jit(step, out_shardings=away)(jax.device_put(x, away))
    if out.sharding.memory_kind != "pinned_host":
        raise WrongError(f"the result rests in {out.sharding.memory_kind}, not in pinned_host")
    if not np.array_equal(np.asarray(out), x + 1):
        raise WrongError("values changed on the way to the host and back")
    return "rests in pinned_host, computes on the device"
