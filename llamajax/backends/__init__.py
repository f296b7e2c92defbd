"""What the machine is: starting JAX on it, and what is known of its devices.

Names are looked up when they are used, so that what needs no JAX does not wait for its import.
"""

import importlib
from typing import Any

_HOME = {
    "Device": "devices",
    "Machine": "runtime",
    "Target": "topologies",
    "absent_devices": "topologies",
    "attention_preferences": "devices",
    "cache_directory": "topologies",
    "child_environment": "children",
    "follow_launcher": "children",
    "peak_flops": "devices",
    "peak_memory_bytes": "runtime",
    "program_bytes": "runtime",
    "seen_alive": "children",
    "show_alive": "children",
    "start": "runtime",
    "with_huge_pages": "hugepages",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
