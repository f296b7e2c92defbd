"""What the machine is: starting JAX on it, and what is known of its devices.

Names are looked up when they are used, so that what needs no JAX does not wait for its import.
"""

import importlib
from typing import Any

_HOME = {
    "Device": "devices",
    "Machine": "runtime",
    "ProbeResult": "stored_verdict",
    "Target": "topologies",
    "PlatformVerdict": "stored_verdict",
    "absent_devices": "topologies",
    "attention_preferences": "platforms",
    "built_for": "plugin",
    "cache_directory": "folders",
    "child_environment": "launcher_environment",
    "computes_attention": "platforms",
    "default_dtype": "platforms",
    "donated_bytes": "runtime",
    "exit_with_launcher": "launcher_environment",
    "is_host": "platforms",
    "lock_file": "file_lock",
    "lost_features": "jax_private",
    "may_alias_host_memory": "platforms",
    "machine_profile": "profile",
    "memory_in_use": "runtime",
    "peak_flops": "devices",
    "platform_of_attention": "platforms",
    "profile_lines": "profile",
    "program_bytes": "runtime",
    "read_verdict": "stored_verdict",
    "is_deterministic": "platforms",
    "report_checkpoint": "launcher_environment",
    "last_alive_s": "launcher_environment",
    "report_alive": "launcher_environment",
    "start": "runtime",
    "untested_versions": "jax_private",
    "verdict_path": "stored_verdict",
    "with_huge_pages": "hugepages",
    "write_verdict": "stored_verdict",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
