"""Repairs: what llamajax makes up for on a platform that JAX does not know, and what chooses them.

JAX keeps two lists of platforms, of those that may reuse donated memory and of those whose
executables may be kept on disk; a new platform is in neither and is told so at most in a warning.
The two lists are private: `jax_private` checks that they are as expected. `config.backend.repairs`
says which: `auto` those that the doctor saw work on this platform, `none`, or names.

The doctor's verdict is one JSON file for each platform, version of it, device kind and release of
JAX, in the user's cache directory, so that a backend is probed once. Its `repairs` name what the
doctor saw work: a repair that adds something (donation, the compile cache) when its probe, run with
that repair forced, passed; one that replaces something (asynchronous copies of checkpoints, an
attention) when the probe of what it replaces failed.
"""

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from llamajax.backends.compile_cache import cache_directory
from llamajax.backends.jax_private import TESTED, cache_hook, donation
from llamajax.backends.platforms import platform_facts
from llamajax.errors import combine, did_you_mean, nearest
from llamajax.files import write_file

READY, READY_WITH_REPAIRS, NOT_READY = "ready", "ready with repairs", "not ready"
Status = Literal["pass", "fail", "unsupported"]

DONATION = "donation"  # else weights and optimizer live twice
COMPILE_CACHE = "compile_cache"  # else every start compiles anew
SYNCHRONOUS_CHECKPOINTS = "synchronous_checkpoints"  # a save ends before the next step
PLAIN_ATTENTION = "plain_attention"  # no blocks, no kernel
REPAIRS = (DONATION, COMPILE_CACHE, SYNCHRONOUS_CHECKPOINTS, PLAIN_ATTENTION)
_PRIVATE = {DONATION: donation, COMPILE_CACHE: cache_hook}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What one probe of the doctor found on a platform; `message` says it in words."""

    name: str
    status: Status
    message: str
    time_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlatformVerdict:
    """What the doctor says of one platform: doctor.json. verdict: READY or one of the others."""

    platform: str
    platform_version: str
    device_kind: str
    jax: str
    verdict: str
    repairs: tuple[str, ...]
    probes: tuple[ProbeResult, ...]


def verdict_path(machine: Any) -> Path:
    """Return the file of the verdict on a machine (or of a verdict), under the installed JAX."""
    facts = [machine.platform, machine.platform_version, machine.device_kind]
    key = json.dumps([*facts, jax.__version__])
    words = re.sub(r"[^a-z0-9]+", "-", f"{facts[0]} {facts[2]}".lower()).strip("-")
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    return cache_directory("doctor") / f"{words}-{digest}" / "doctor.json"


def write_verdict(verdict: PlatformVerdict) -> Path:
    """Write a verdict to where runs look for it. Returns the file. Raises OSError."""
    path = verdict_path(verdict)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(dataclasses.asdict(verdict), indent=1) + "\n")
    return path


def read_verdict(machine: Any) -> PlatformVerdict | None:
    """Return the verdict on a machine; None where there is none, or only a damaged file."""
    try:
        found = json.loads(verdict_path(machine).read_text(encoding="utf-8"))
        found["probes"] = tuple(ProbeResult(**probe) for probe in found["probes"])
        found["repairs"] = tuple(str(name) for name in found["repairs"])
        fields = [field.name for field in dataclasses.fields(PlatformVerdict)]
        return PlatformVerdict(**{name: found[name] for name in fields})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def choose_repairs(text: str, platform: str, verdict: PlatformVerdict | None) -> tuple[str, ...]:
    """Return the repairs that `backend.repairs` asks for on a platform, in the order of REPAIRS.

    Raises UserError for a name that is none, or for one that this release of JAX does not allow.
    """
    if text == "none":
        return ()
    if text == "auto":
        seen = () if verdict is None else verdict.repairs
        return tuple(name for name in REPAIRS if name in seen and not _obstacle(name, platform))
    names = [name.strip() for name in text.split(",")]
    problems = [
        f"backend.repairs: there is no repair {name!r}{did_you_mean(nearest(name, REPAIRS)) or '.'}"
        f" They are {', '.join(REPAIRS)}; or auto, or none"
        for name in names
        if name not in REPAIRS
    ]
    problems += [
        f"backend.repairs: {name}: {why}" for name in names if (why := _obstacle(name, platform))
    ]
    if problems:
        raise combine(problems, title="the repairs cannot be made:")
    return tuple(name for name in REPAIRS if name in names)


def _obstacle(name: str, platform: str) -> str | None:
    """Return why a repair that needs a private part of JAX cannot be made; None if it can."""
    part = _PRIVATE.get(name)
    if part is None or platform_facts(platform).is_known_to_jax or not (why := part.problem()):
        return None
    return f"{why}; install a release of jax that was tested: {', '.join(TESTED['jax'])}"


def is_donating(platform: str, repairs: Sequence[str]) -> bool:
    """Return whether donated memory is used again there, with these repairs."""
    return platform_facts(platform).is_known_to_jax or DONATION in repairs


def apply_to_lowering(platform: str, repairs: Sequence[str]) -> None:
    """Make up for what JAX lowers differently there, before anything is traced for it."""
    if DONATION in repairs and not platform_facts(platform).is_known_to_jax:
        donation.enable(platform)
    elif not is_donating(platform, repairs):
        # Not one warning a program about what the start of a run says once.
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")


def advice(platform: str, verdict: PlatformVerdict | None) -> str | None:
    """Return what to tell the user of a platform that JAX does not know; None where all is well."""
    if verdict is None:
        return (
            f"{platform} is new to JAX and was not examined: run `python -m llamajax.doctor` with "
            "the same backend first. Until then: no reuse of donated memory (weights and optimizer "
            "live twice), no compile cache"
        )
    if verdict.verdict == NOT_READY:
        failed = [probe.name for probe in verdict.probes if probe.status == "fail"]
        return f"the doctor calls {platform} not ready: {', '.join(failed) or 'see its table'}"
    return None
