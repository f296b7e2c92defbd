"""Look up what is known of a device kind: in the user's own table first, then in `device_data`.

An unknown kind has no peak, so its MFU is null: nothing is ever assumed from another device. A
user adds devices with `--config.backend.device_table=FILE`, a TOML file:

```toml
[[device]]
kind = "Ascend 910B"            # how JAX's device_kind begins
bfloat16 = 376e12               # peak FLOP/s of matrix products, dense
memory_gib = 64
hbm_bytes_per_s = 1.6e12
fast_bytes_per_s = 196e9        # to its neighbors in the node, one direction
source = "the vendor's data sheet"
# optional: name, float32, float8, xla_gib, slow_bytes_per_s, efficiency
```
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamajax.backends.device_data import (
    DEVICES,
    FRACTION_VARIABLES,
    GPU_MEMORY_FRACTION,
    Device,
)
from llamajax.config.schema import TrainDtype
from llamajax.errors import UserError, combine, did_you_mean, nearest

_GIB = 2**30
_REQUIRED_TEXTS, _TEXTS = ("kind", "source"), ("kind", "source", "name")
_REQUIRED_NUMBERS = ("bfloat16", "memory_gib", "hbm_bytes_per_s", "fast_bytes_per_s")
_NUMBERS = (*_REQUIRED_NUMBERS, "float32", "float8", "xla_gib", "slow_bytes_per_s", "efficiency")
_KEYS = (*_TEXTS, *_NUMBERS)
# Predictions need one; two thirds is what large products reach on the devices that are known.
_EFFICIENCY = 0.66

_added: tuple[Device, ...] = ()


def find(device_kind: str) -> Device | None:
    """Return the entry of a device kind, or None when it is not known."""
    return next((d for d in (*_added, *DEVICES) if device_kind.startswith(d.kind)), None)


def peak_flops(device_kind: str, dtype: TrainDtype) -> tuple[float, str] | None:
    """Return one device's peak FLOP/s in `dtype` and its source; None when unknown."""
    device = find(device_kind)
    peak = device.peak(dtype) if device else None
    return None if peak is None else (peak, device.source)


def multiplies_float8(device_kind: str) -> bool:
    """Return whether a device is known to multiply in 8 bits."""
    device = find(device_kind)
    return device is not None and device.float8 is not None


def give_gpu_memory() -> None:
    """Let XLA have GPU_MEMORY_FRACTION of a GPU, as plans assume, unless the user decided."""
    if not any(os.environ.get(name) for name in FRACTION_VARIABLES):
        os.environ[FRACTION_VARIABLES[0]] = str(GPU_MEMORY_FRACTION)


def use_device_table(file: str | None) -> None:
    """Look in a user's TOML file first from now on, instead of that of an earlier call.

    Raises one UserError with every mistake in it.
    """
    global _added
    _added = _read(file) if file else ()


def _read(file: str) -> tuple[Device, ...]:
    title = f"backend.device_table = {file}:"
    try:
        found = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{title} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{title} is not TOML: {error}") from None
    problems = [
        f"unknown key {key!r}{did_you_mean(nearest(key, ('device',))) or '.'} "
        "Devices stand under [[device]]"
        for key in found
        if key != "device"
    ]
    entries = found.get("device", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        problems.append("device is no list of tables; write [[device]] above each")
        entries = []
    elif not entries and not problems:
        problems.append("there is no device in it; write [[device]] and its keys below")
    for number, entry in enumerate(entries, start=1):
        problems += [f"device {number}: {problem}" for problem in _problems(entry)]
    kinds = [entry["kind"] for entry in entries if "kind" in entry]
    problems += [
        f"kind {kind!r} is there {kinds.count(kind)} times; describe it once"
        for kind in dict.fromkeys(kinds)
        if kinds.count(kind) > 1
    ]
    if problems:
        raise combine(problems, title=title)
    return tuple(_device(**entry) for entry in entries)


def _problems(entry: Mapping[str, Any]) -> list[str]:
    problems = []
    for key in entry:
        if key not in _KEYS:
            hint = did_you_mean(nearest(key, _KEYS)) or "."
            problems.append(f"unknown key {key!r}{hint} Keys: {', '.join(_KEYS)}")
    missing = [key for key in (*_REQUIRED_TEXTS, *_REQUIRED_NUMBERS) if key not in entry]
    if missing:
        problems.append(f"{', '.join(missing)}: missing, and needed")
    for key, value in entry.items():
        if key in _TEXTS and not (isinstance(value, str) and value.strip()):
            problems.append(f"{key} = {value!r}: must be text in quotes")
        elif key in _NUMBERS and not (type(value) in (int, float) and 0 < value < 1e30):
            problems.append(f"{key} = {value!r}: must be a number above 0")
        elif key == "efficiency" and value > 1:
            problems.append(f"efficiency = {value}: is a share of the peak, at most 1")
    return problems


def _device(
    *,
    kind: str,
    source: str,
    memory_gib: float,
    name: str | None = None,
    xla_gib: float | None = None,
    efficiency: float = _EFFICIENCY,
    **numbers: float,
) -> Device:
    optional = {"float32": None, "slow_bytes_per_s": None}
    return Device(
        kind=kind,
        name=name or kind,
        memory_bytes=int(memory_gib * _GIB),
        xla_bytes=int((xla_gib or memory_gib) * _GIB),
        efficiency=float(efficiency),
        source=source,
        **optional | {key: float(value) for key, value in numbers.items()},
    )
