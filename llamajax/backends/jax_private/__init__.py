"""Every use of a private part of JAX, Orbax or grain, and the one table of tested releases.

A private part changes without notice. Each module here therefore has a `problem()`, which looks at
the part itself: the parameters of a primitive, the type and contents of a list. The version does
not decide. What a missing part costs is in `lost_features`, which a run prints and stores.
"""

from importlib.metadata import version

# The releases that the tests ran with. The upper bounds in pyproject.toml follow from these.
TESTED = {
    "jax": ("0.10.0", "0.10.1", "0.10.2", "0.11.2", "0.12.0"),
    "orbax-checkpoint": ("0.12.8",),
    "grain": ("0.2.18",),
}
# The StableHLO of these releases. A plugin's tells which of them it was built with.
STABLEHLO = {(1, 16): "0.10.0", (1, 17): "0.10.2", (1, 20): "0.11.2", (1, 22): "0.12.0"}


def untested_versions() -> list[str]:
    """Return the installed packages whose release is not in `TESTED`, such as "jax 0.13.0"."""
    installed = {name: version(name) for name in TESTED}
    return [
        f"{name} {found}"
        for name, found in installed.items()
        if not any(f"{found}.".startswith(f"{tested}.") for tested in TESTED[name])
    ]


def lost_features(platform: str) -> dict[str, str]:
    """Return what a run on this platform does without, and why; empty if every part is there."""
    from llamajax.backends.jax_private import (
        cache_hook,
        cudnn,
        donation,
        literal_glob,
        orbax_tensorstore,
    )
    from llamajax.backends.platforms import platform_facts

    facts = platform_facts(platform)
    problems = {
        "atomic_compile_cache": cache_hook.problem(),
        "brackets_in_paths": literal_glob.problem(),
        "tensorstore_options": orbax_tensorstore.problem(),
    }
    if "cudnn" in facts.fused_attention:
        problems["cudnn_attention"] = cudnn.problem()
    if not facts.is_known_to_jax:
        problems["donation"] = donation.problem()
    return {feature: reason for feature, reason in problems.items() if reason}
