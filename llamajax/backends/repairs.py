"""What JAX takes from a platform that it does not know, given back; and what is done without.

JAX keeps two lists of platforms, of those that may reuse donated memory and of those whose
executables may be kept on disk; a new platform is in neither and is told so at most in a warning.
The two lists are private: `jax_private` checks that they are as expected. `config.backend.repairs`
says which: `auto` those that the doctor saw work on this platform, `none`, or names.
"""

import warnings
from collections.abc import Sequence

from llamajax.backends.jax_private import TESTED, cache_hook, donation
from llamajax.backends.platforms import platform_facts
from llamajax.backends.stored_verdict import NOT_READY, PlatformVerdict
from llamajax.config import did_you_mean, nearest
from llamajax.errors import combine

DONATION = "donation"
COMPILE_CACHE = "compile_cache"
SYNCHRONOUS_CHECKPOINTS = "synchronous_checkpoints"
PLAIN_ATTENTION = "plain_attention"
REPAIRS = {
    DONATION: "memory of donated arrays is used again: else weights and optimizer live twice",
    COMPILE_CACHE: "compiled programs are kept on disk: else every start compiles anew",
    SYNCHRONOUS_CHECKPOINTS: "a checkpoint is on disk before the next step: no copies beside it",
    PLAIN_ATTENTION: "attention as the plain operations of the reference, no blocks, no kernel",
}
_PRIVATE = {DONATION: donation, COMPILE_CACHE: cache_hook}
# What a platform that JAX does not know loses without the first two.
LOST = "no reuse of donated memory (weights and optimizer live twice), no compile cache"


def chosen(text: str, *, platform: str, verdict: PlatformVerdict | None) -> tuple[str, ...]:
    """The repairs that `backend.repairs` asks for on this platform, in the order of REPAIRS.

    UserError for a name that is none, or for one that this release of JAX does not allow.
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
    """Whether donated memory is used again there, with these repairs."""
    return platform_facts(platform).is_known_to_jax or DONATION in repairs


def apply_to_lowering(platform: str, repairs: Sequence[str]) -> None:
    """Make up for what JAX lowers differently there, before anything is traced for it."""
    if DONATION in repairs and not platform_facts(platform).is_known_to_jax:
        donation.enable(platform)
    elif not is_donating(platform, repairs):
        say_less_of_donation()


def advice(platform: str, verdict: PlatformVerdict | None) -> str | None:
    """What to tell the user of a platform that JAX does not know; None where all is well."""
    if verdict is None:
        return (
            f"{platform} is new to JAX and was not examined: run `python -m llamajax.doctor` with "
            f"the same backend first. Until then: {LOST}"
        )
    if verdict.verdict == NOT_READY:
        failed = [probe.name for probe in verdict.probes if probe.status == "fail"]
        return f"the doctor calls {platform} not ready: {', '.join(failed) or 'see its table'}"
    return None


def say_less_of_donation() -> None:
    """Not one warning a program about what the start of a run says once."""
    warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
