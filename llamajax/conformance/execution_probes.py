"""Probes of execution: asynchronous calls, endurance, compile cache, profiler, topology."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from llamajax.conformance.bench import Bench, UnsupportedError, WrongError

_EXECUTIONS = 2000
_LONG_ENOUGH_S = 0.2
_HIDDEN = 0.5  # of the time of a long computation that the call may take
_CACHED_LAYERS = 12


def asynchronous_dispatch(bench: Bench) -> str:
    """Check that a call returns before its long computation is done."""
    x = jnp.full((512, 512), 1e-3, jnp.float32, device=bench.devices[0])
    run = jax.jit(lambda x, times: jax.lax.fori_loop(0, times, lambda _, y: jnp.tanh(y @ x), x))
    jax.block_until_ready(run(x, 1))
    times = 8
    while True:
        begun = time.monotonic()
        out = run(x, times)
        called = time.monotonic() - begun
        jax.block_until_ready(out)
        whole = time.monotonic() - begun
        if whole > _LONG_ENOUGH_S:
            break
        times *= 2
    text = f"a call of {whole * 1e3:.0f} ms returned after {called * 1e3:.1f} ms"
    if called > _HIDDEN * whole:
        raise UnsupportedError(text)
    return text


def endurance(bench: Bench) -> str:
    """Execute a program many times, each on the result of the one before."""
    add = jax.jit(lambda x: x + 1)
    x = bench.put(np.float32(0))
    begun, number = time.monotonic(), 0
    try:
        for number in range(1, _EXECUTIONS + 1):
            x = add(x)
            if number % 50 == 0:
                x.block_until_ready()
        found = float(x)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise WrongError(f"failed by execution {number} of {_EXECUTIONS}: {reason}") from None
    if found != _EXECUTIONS:
        raise WrongError(f"1 added {_EXECUTIONS} times is {found:g}")
    spent = (time.monotonic() - begun) / _EXECUTIONS
    return f"{_EXECUTIONS} executions, {spent * 1e6:.0f} us each"


def compile_cache(bench: Bench) -> str:
    """Compile a program, store it, forget it, and read it again."""
    folder = bench.machine.compile_cache
    if folder is None:
        raise UnsupportedError(f"JAX keeps no compiled programs of {bench.machine.platform}")
    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
    x = bench.put(np.ones((64, 64), np.float32))
    first, fresh_s = _compiled_and_run(x)
    if not [path for path in Path(folder).rglob("*") if path.is_file()]:
        raise UnsupportedError("no compiled program was kept")
    jax.clear_caches()
    hits.clear()
    second, again_s = _compiled_and_run(x)
    if "/jax/compilation_cache/cache_hits" not in hits:
        raise WrongError("a program that was kept was not found again")
    if not np.array_equal(first, second):
        raise WrongError("a program that was kept computes other values")
    return f"compiled in {fresh_s:.2f} s, read again in {again_s:.2f} s, with the same results"


def _compiled_and_run(x: jax.Array) -> tuple[np.ndarray, float]:
    def layers(x: jax.Array) -> jax.Array:
        for n in range(_CACHED_LAYERS):  # unrolled, so that there is something to compile
            x = jax.nn.softmax(jnp.sin(x @ x + n), axis=-1)
        return x

    begun = time.monotonic()
    compiled = jax.jit(layers).lower(x).compile()
    return np.asarray(compiled(x)), time.monotonic() - begun


def profiler(bench: Bench) -> str:
    """Check that a profile shows the device."""
    with jax.profiler.trace(bench.folder):
        x = bench.put(np.ones((256, 256), np.float32))
        jax.block_until_ready(jax.jit(lambda x: x @ x)(x))
    files = [path for path in bench.folder.rglob("*.xplane.pb") if path.stat().st_size]
    if not files:
        raise UnsupportedError("no profile was written")
    planes = list(jax.profiler.ProfileData.from_file(str(files[0])).planes)
    shown = {plane.name: sum(len(list(line.events)) for line in plane.lines) for plane in planes}
    full = [f"{name} ({count} events)" for name, count in shown.items() if count]
    if not full:
        raise UnsupportedError("the profile has no event")
    return f"profile with {', '.join(full)}"


def topology(bench: Bench) -> str:
    """Compile a program for devices that are described and not here."""
    first, problems = bench.devices[0], []
    for name in ("", str(len(bench.devices))):  # a vendor's names are its own; these are a guess
        try:
            absent = topologies.get_topology_desc(name, first.platform).devices
            sharding = jax.sharding.SingleDeviceSharding(absent[0])
            x = jax.ShapeDtypeStruct((7, 5), jnp.float32, sharding=sharding)
            jax.jit(lambda x: jnp.tanh(x) @ x.T).lower(x).compile()
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            problems.append(str(error))
            continue
        return f"topology {name!r}: {len(absent)} of kind {absent[0].device_kind}; compiles for it"
    raise UnsupportedError("; ".join(dict.fromkeys(problems)))
