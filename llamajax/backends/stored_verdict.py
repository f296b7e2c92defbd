"""What the doctor found out about a platform, kept so that a backend is probed once.

One JSON file for each platform, version of it, device kind and release of JAX, in the user's cache
directory. The doctor writes it with `write_verdict`, everything else reads it with `read_verdict`;
a file is never changed by hand-made merging, a new examination replaces it whole.

Names in `repairs` are those of `repairs.REPAIRS`: what the doctor saw work there, and what `train`
therefore applies by itself. A repair that adds something (donation, the compile cache) stands there
when its probe, run with that repair forced, passed; one that replaces something (asynchronous
copies of checkpoints, an attention) when the probe of what it replaces failed.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from llamajax.backends.folders import cache_directory
from llamajax.files import write_file

READY, READY_WITH_REPAIRS, NOT_READY = "ready", "ready with repairs", "not ready"
Status = Literal["pass", "fail", "unsupported"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """One question that was put to a platform, and its answer; `message` says it in words."""

    name: str
    status: Status
    message: str
    time_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlatformVerdict:
    """What the doctor says of one platform. `verdict` is one of the three words above."""

    platform: str
    platform_version: str
    device_kind: str
    jax: str
    verdict: str
    repairs: tuple[str, ...]
    probes: tuple[ProbeResult, ...]

    def passed(self, name: str) -> bool | None:
        """Whether the probe of that name passed; None where it was not put."""
        found = [probe for probe in self.probes if probe.name == name]
        return found[0].status == "pass" if found else None

    def to_json(self) -> dict[str, Any]:
        """The object that doctor.json holds."""
        return dataclasses.asdict(self)


def verdict_path(*, platform: str, platform_version: str, device_kind: str) -> Path:
    """Where the verdict on this platform lies, under the JAX that is installed."""
    key = json.dumps([platform, platform_version, device_kind, jax.__version__])
    words = re.sub(r"[^a-z0-9]+", "-", f"{platform} {device_kind}".lower()).strip("-")
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    return cache_directory("doctor") / f"{words}-{digest}" / "doctor.json"


def write_verdict(verdict: PlatformVerdict) -> Path:
    """Keep a verdict where runs look for it; atomic. OSError where the disk refuses."""
    path = verdict_path(
        platform=verdict.platform,
        platform_version=verdict.platform_version,
        device_kind=verdict.device_kind,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(verdict.to_json(), indent=1) + "\n")
    return path


def read_verdict(
    *, platform: str, platform_version: str, device_kind: str
) -> PlatformVerdict | None:
    """The verdict on this platform; None where the doctor was not there, or the file is no such."""
    path = verdict_path(
        platform=platform, platform_version=platform_version, device_kind=device_kind
    )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        probes = tuple(ProbeResult(**probe) for probe in found.pop("probes"))
        names = [
            field.name for field in dataclasses.fields(PlatformVerdict) if field.name != "probes"
        ]
        facts = {name: found[name] for name in names}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # a damaged file is no verdict: the doctor is to come again
    return PlatformVerdict(**facts | {"repairs": _words(facts["repairs"])}, probes=probes)


def _words(names: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(name) for name in names)
