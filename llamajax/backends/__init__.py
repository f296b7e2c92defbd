"""What the machine is: starting JAX on it, and what is known of its devices.

Names are looked up when they are used: `with_huge_pages` must run before JAX is imported, and what
needs no JAX does not wait for its import.
"""

import importlib
from typing import Any

_NAMES = {
    "compile_cache": ("cache_directory",),
    "compiler_options": ("CompilerOptions", "choose_compiler_options", "compiler_flags"),
    "devices": ("Device", "multiplies_float8", "peak_flops"),
    "hugepages": ("with_huge_pages",),
    "jax_private": ("lost_features", "untested_versions"),
    "machine_facts": (
        "donated_bytes", "host_memory_bytes", "machine_profile", "machine_warnings",
        "memory_in_use", "memory_limit_bytes", "profile_lines", "program_bytes",
        "undonated_warnings",
    ),
    "platforms": ("platform_facts", "platform_of_attention"),
    "plugin": ("built_for",),
    "process_environment": (
        "child_environment", "exit_with_launcher", "keep_harness_from_forking", "last_alive_s",
        "report_alive", "report_checkpoint",
    ),
    "repairs": ("PlatformVerdict", "ProbeResult", "write_verdict"),
    "runtime": ("Machine", "start"),
    "topologies": ("Target", "absent_devices"),
}  # fmt: skip
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
