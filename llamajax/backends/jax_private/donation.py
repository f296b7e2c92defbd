"""JAX's list of the platforms on which donated memory is reused."""

from typing import Any

import jax


def _platforms() -> Any:
    from jax._src.interpreters import mlir

    return getattr(mlir, "_platforms_with_donation", None)


def problem() -> str | None:
    """Return why a platform cannot be added to JAX's list; None if it can."""
    platforms = _platforms()
    if isinstance(platforms, list) and {"cpu", "cuda", "tpu"} <= set(platforms):
        return None
    return (
        f"jax {jax.__version__} has no list of platforms that reuse donated memory where earlier "
        "releases have it"
    )


def enable(platform: str) -> None:
    """Add a platform to JAX's list, before anything is lowered for it."""
    platforms = _platforms()
    if platform not in platforms:
        platforms.append(platform)
