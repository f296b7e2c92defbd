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
```
"""

import dataclasses
import os
import tomllib
from pathlib import Path

from llamajax.backends.device_data import (
    DEVICES,
    FRACTION_VARIABLES,
    GPU_MEMORY_FRACTION,
    Device,
)
from llamajax.config.forms import not_empty
from llamajax.config.load import build_list
from llamajax.config.schema import TrainDtype
from llamajax.config.values import Mistyped, key
from llamajax.errors import UserError, combine

_GIB = 2**30


def _check_share(value: float) -> None:
    if value > 1:
        raise Mistyped("is a share of the peak: at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
    """One [[device]] of a user's file."""

    kind: str = key(
        "how JAX's device_kind begins", check=not_empty("an empty kind would be every device")
    )
    source: str = key("who says so", check=not_empty("say where the figures are from"))
    bfloat16: float = key("peak FLOP/s of matrix products, dense", above=0)
    memory_gib: float = key("on the data sheet", above=0)
    hbm_bytes_per_s: float = key("of its memory", above=0)
    fast_bytes_per_s: float = key("to its neighbors in the node, one direction", above=0)
    slow_bytes_per_s: float | None = key("between nodes", default=None, above=0)
    name: str | None = key("short", default=None, check=not_empty("without it, it is the kind"))
    float32: float | None = key("peak FLOP/s", default=None, above=0)
    float8: float | None = key("peak FLOP/s", default=None, above=0)
    xla_gib: float | None = key("what XLA sees of the memory", default=None, above=0)
    # Predictions need one; two thirds is what large products reach on the devices that are known.
    efficiency: float = key(
        "share of the peak that large products reach", default=0.66, above=0, check=_check_share
    )

    def device(self) -> Device:
        """Return the entry in the form of our own."""
        facts = dataclasses.asdict(self) | {"name": self.name or self.kind}
        memory_gib, xla_gib = facts.pop("memory_gib"), facts.pop("xla_gib")
        sizes = {"memory_bytes": memory_gib, "xla_bytes": xla_gib or memory_gib}
        return Device(**facts, **{name: int(gib * _GIB) for name, gib in sizes.items()})


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
    problems = [f"unknown key {name!r}: devices stand under [[device]]" for name in found
                if name != "device"]  # fmt: skip
    items = found.get("device")
    if not isinstance(items, list) or not items:
        raise combine(
            [*problems, "has no list of devices; write [[device]] above each"], title=title
        )
    entries, wrong = build_list("device", _Entry, items)
    problems += wrong
    kinds = [item["kind"] for item in items if isinstance(item, dict) and "kind" in item]
    problems += [
        f"kind {kind!r} is there {kinds.count(kind)} times; describe it once"
        for kind in dict.fromkeys(map(str, kinds))
        if kinds.count(kind) > 1
    ]
    if problems:
        raise combine(problems, title=title)
    return tuple(entry.device() for entry in entries)
