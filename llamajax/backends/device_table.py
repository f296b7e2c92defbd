"""A user's own devices, from a TOML file: `--config.backend.device_table=FILE`, no code.

```toml
[[device]]
kind = "Ascend 910B"            # how JAX's device_kind begins
bfloat16 = 376e12               # peak FLOP/s of matrix products, dense
memory_gib = 64
hbm_bytes_per_s = 1.6e12
fast_bytes_per_s = 196e9        # to its neighbours in the node, one direction
source = "the vendor's data sheet"
# optional: name, float32, xla_gib, slow_bytes_per_s, efficiency
```
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamajax.backends.device_data import Device
from llamajax.config import did_you_mean, nearest
from llamajax.errors import UserError, combine

_GIB = 2**30
_NUMBERS = {
    "bfloat16": True,
    "memory_gib": True,
    "hbm_bytes_per_s": True,
    "fast_bytes_per_s": True,
    "float32": False,
    "xla_gib": False,
    "slow_bytes_per_s": False,
    "efficiency": False,
}
_TEXTS = {"kind": True, "source": True, "name": False}
_KEYS = {**_TEXTS, **_NUMBERS}
# Predictions need one; two thirds is what large products reach on the devices that are known.
_EFFICIENCY = 0.66


def read_device_table(file: str) -> tuple[Device, ...]:
    """The devices of a TOML file. UserError with every mistake in it at once."""
    path = Path(file)
    title = f"backend.device_table = {file}:"
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
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
    kinds = [entry.get("kind") for entry in entries]
    problems += [
        f"kind {kind!r} is there {kinds.count(kind)} times; describe it once"
        for kind in dict.fromkeys(kinds)
        if kind is not None and kinds.count(kind) > 1
    ]
    if problems:
        raise combine(problems, title=title)
    return tuple(_device(entry) for entry in entries)


def _problems(entry: Mapping[str, Any]) -> list[str]:
    problems = []
    for key in entry:
        if key not in _KEYS:
            hint = did_you_mean(nearest(key, _KEYS)) or "."
            problems.append(f"unknown key {key!r}{hint} Keys: {', '.join(_KEYS)}")
    missing = [key for key, required in _KEYS.items() if required and key not in entry]
    if missing:
        problems.append(f"{', '.join(missing)}: missing, and needed")
    for key in _TEXTS:
        value = entry.get(key)
        if value is not None and not (isinstance(value, str) and value.strip()):
            problems.append(f"{key} = {value!r}: must be text in quotes")
    for key in _NUMBERS:
        value = entry.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            problems.append(f"{key} = {value!r}: must be a number above 0")
        elif key == "efficiency" and value > 1:
            problems.append(f"efficiency = {value}: is a share of the peak, at most 1")
    return problems


def _device(entry: Mapping[str, Any]) -> Device:
    memory = int(entry["memory_gib"] * _GIB)
    slow = entry.get("slow_bytes_per_s")
    return Device(
        kind=entry["kind"],
        name=entry.get("name", entry["kind"]),
        bfloat16=float(entry["bfloat16"]),
        float32=float(entry["float32"]) if "float32" in entry else None,
        memory_bytes=memory,
        xla_bytes=int(entry["xla_gib"] * _GIB) if "xla_gib" in entry else memory,
        hbm_bytes_per_s=float(entry["hbm_bytes_per_s"]),
        fast_bytes_per_s=float(entry["fast_bytes_per_s"]),
        slow_bytes_per_s=None if slow is None else float(slow),
        efficiency=float(entry.get("efficiency", _EFFICIENCY)),
        source=entry["source"],
    )
