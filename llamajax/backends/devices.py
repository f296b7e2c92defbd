"""What is known of a device kind: looked up in the table, to which a user may add entries.

An unknown kind has no peak, so its MFU is null: nothing is ever assumed from another device.
"""

import os
from collections.abc import Sequence

from llamajax.backends.device_data import (
    DEVICES,
    FRACTION_VARIABLES,
    GPU_MEMORY_FRACTION,
    Device,
)
from llamajax.config.schema import ComputeDtype

__all__ = ["DEVICES", "GPU_MEMORY_FRACTION", "Device", "find", "give_gpu_memory", "peak_flops"]

_added: tuple[Device, ...] = ()


def use_table(entries: Sequence[Device]) -> None:
    """Look in these entries first from now on, instead of those of an earlier call."""
    global _added
    _added = tuple(entries)


def give_gpu_memory() -> None:
    """Let XLA have GPU_MEMORY_FRACTION of a GPU, as plans assume, unless the user decided."""
    if not any(os.environ.get(name) for name in FRACTION_VARIABLES):
        os.environ[FRACTION_VARIABLES[0]] = str(GPU_MEMORY_FRACTION)


def find(device_kind: str) -> Device | None:
    """The entry of a device kind, or None when it is not known."""
    return next((d for d in (*_added, *DEVICES) if device_kind.startswith(d.kind)), None)


def peak_flops(device_kind: str, dtype: ComputeDtype) -> tuple[float, str] | None:
    """Peak FLOP/s of one device in `dtype` and its source; None when unknown (never a guess)."""
    device = find(device_kind)
    peak = getattr(device, dtype) if device else None
    return None if peak is None else (peak, device.source)
