"""The whole profile of the machine that a run chose: said once at its start, and stored with it."""

import dataclasses
import os
from typing import Any

import jax

from llamajax.backends.devices import find
from llamajax.backends.platforms import platform_facts
from llamajax.backends.runtime import Machine
from llamajax.backends.stored_verdict import read_verdict

# What of the environment changes how programs are compiled or memory is given.
_VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "JAX_OPTIMIZATION_LEVEL",
)


def machine_profile(machine: Machine) -> dict[str, Any]:
    """Everything that is known and was decided of the machine, as JSON takes it."""
    facts, device = platform_facts(machine.platform), find(machine.device_kind)
    first = jax.local_devices()[0]
    verdict = read_verdict(
        platform=machine.platform,
        platform_version=machine.platform_version,
        device_kind=machine.device_kind,
    )
    return {
        "platform": machine.platform,
        "platform_version": machine.platform_version,
        "device_kind": machine.device_kind,
        "device": None if device is None else dataclasses.asdict(device),
        "memory_limit_bytes": (first.memory_stats() or {}).get("bytes_limit"),
        "memory_kinds": [memory.kind for memory in first.addressable_memories()],
        "attention_preferences": list(machine.attention_preferences),
        "donates": machine.donates,
        "saves_asynchronously": machine.saves_asynchronously,
        "repairs": list(machine.repairs),
        "doctor": None if verdict is None else verdict.verdict,
        "compile_cache": machine.compile_cache,
        "start_up": facts.start_up,
        "xla_options_advised": list(facts.xla_options),
        "environment": {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)},
        "tested": facts.tested,
        "source": facts.source,
    }


def profile_lines(found: dict[str, Any], note: str | None) -> list[str]:
    """The profile in one to three lines, as a run prints them when it starts."""
    limit = found["memory_limit_bytes"]
    words = [found["platform_version"] or "(no version)"]
    words += [f"{limit / 2**30:.2f} GiB a device"] if limit else []
    words.append(f"memories {', '.join(found['memory_kinds'])}")
    words.append("donation on" if found["donates"] else "donation OFF")
    kept = found["compile_cache"]
    words.append(f"programs kept in {kept}" if kept else "programs not kept")
    lines = [f"backend  {'; '.join(words)}"]
    if found["repairs"]:
        lines.append(
            f"repairs  {', '.join(found['repairs'])} (doctor: {found['doctor'] or 'none'})"
        )
    if note:
        lines.append(f"warning: {note}")
    return lines
