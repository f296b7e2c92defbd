"""What a run records of its machine: the profile at its start, and the memory of its programs."""

import contextlib
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax

from llamajax.backends.compiler_options import COMPILER_VARIABLES
from llamajax.backends.device_data import FRACTION_VARIABLES
from llamajax.backends.devices import find
from llamajax.backends.jax_private import lost_features
from llamajax.backends.platforms import platform_facts
from llamajax.backends.repairs import read_verdict
from llamajax.backends.runtime import Machine

# What of the environment changes how programs are compiled or memory is given, besides JAX_*.
_VARIABLES = (*COMPILER_VARIABLES, *FRACTION_VARIABLES, "XLA_PYTHON_CLIENT_PREALLOCATE")

# Of the control group as a container sees its own: version 2, and 1.
_MEMORY_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def machine_profile(machine: Machine) -> dict[str, Any]:
    """Return everything that is known and was decided of the machine, as JSON takes it."""
    facts, device = platform_facts(machine.platform), find(machine.device_kind)
    first = jax.local_devices()[0]
    verdict = read_verdict(machine)
    return {
        "platform": machine.platform,
        "platform_version": machine.platform_version,
        "device_kind": machine.device_kind,
        "device": None if device is None else dataclasses.asdict(device),
        "memory_limit_bytes": memory_limit_bytes(),
        "memory_kinds": [memory.kind for memory in first.addressable_memories()],
        "attention_preferences": list(machine.attention_preferences),
        "donates": machine.donates,
        "saves_asynchronously": machine.saves_asynchronously,
        "repairs": list(machine.repairs),
        "doctor": None if verdict is None else verdict.verdict,
        "compile_cache": machine.compile_cache,
        "start_up": facts.start_up,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if value and (name in _VARIABLES or name.startswith("JAX_"))
        },
        "tested": facts.tested,
        "source": facts.source,
    }


def memory_limit_bytes() -> int | None:
    """Return the memory that programs may take of this process's first device, if it says so."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def profile_lines(machine: Machine) -> list[str]:
    """Return the profile and its warnings, as verbs print them when they start."""
    found = machine_profile(machine)
    limit, kept = found["memory_limit_bytes"], found["compile_cache"]
    words = [
        found["platform_version"] or "(no version)",
        f"{limit / 2**30:.2f} GiB a device" if limit else None,
        f"memories {', '.join(found['memory_kinds'])}",
        "donation on" if found["donates"] else "donation OFF",
        f"programs kept in {kept}" if kept else "programs not kept",
    ]
    lines = [f"backend  {'; '.join(filter(None, words))}"]
    if found["repairs"]:
        doctor = found["doctor"] or "none"
        lines.append(f"repairs  {', '.join(found['repairs'])} (doctor: {doctor})")
    return lines + machine_warnings(machine)


def machine_warnings(machine: Machine) -> list[str]:
    """Return what is odd about the machine, and what this release of JAX makes a run do without."""
    lines = [f"warning: {machine.note}"] if machine.note else []
    lost = lost_features(machine.platform)
    reasons = "; ".join(f"{feature}: {reason}" for feature, reason in lost.items())
    return lines + [f"warning: this run does without {reasons}"] * bool(lost)


def program_bytes(compiled: Any) -> int | None:
    """Return the memory of one device that a compiled program asks for; None where unknown."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + kept


def donated_bytes(compiled: Any) -> tuple[int, int] | None:
    """Return bytes of one device that were donated to a compiled program, and those it reuses.

    None where that is unknown.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    # An argument that the program does not read has no sharding: it is not passed at all.
    infos, shardings = (
        jax.tree.leaves(tree, is_leaf=lambda x: x is None)
        for tree in (compiled.args_info, compiled.input_shardings)
    )
    given = sum(
        math.prod(sharding.shard_shape(info.shape)) * info.dtype.itemsize
        for info, sharding in zip(infos, shardings, strict=True)
        if sharding is not None and info.donated
    )
    return given, memory.alias_size_in_bytes + memory.host_alias_size_in_bytes


def undonated_warnings(compiled: Any, program: str, what: str) -> list[str]:
    """Return a line where a compiled program keeps part of what is donated twice, or nothing."""
    donated = donated_bytes(compiled)
    if not donated or donated[1] >= donated[0]:
        return []
    twice = (donated[0] - donated[1]) / 2**30
    return [
        f"{program} does not reuse {twice:.3g} GiB of its {what} on each device, which is in "
        "memory twice"
    ]


def host_memory_bytes() -> int | None:
    """Return the memory that this process may use: the host's, or its control group's if less.

    None where the system does not say.
    """
    found = []
    with contextlib.suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in _MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            found.append(int(Path(path).read_text(encoding="ascii")))
    return min(found, default=None)


def memory_in_use() -> dict[str, list[int]]:
    """Return bytes in use, and their peak, by local device; empty where that is unknown."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    named = {"memory_bytes": "bytes_in_use", "peak_memory_bytes": "peak_bytes_in_use"}
    found = {name: [s[key] for s in stats if key in s] for name, key in named.items()}
    return {name: values for name, values in found.items() if values}
