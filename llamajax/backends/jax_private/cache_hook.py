"""JAX's compile cache: the function that opens its files, and its check of the platform."""

import inspect
from collections.abc import Callable
from typing import Any

import jax


def _module() -> Any:
    from jax._src import compilation_cache

    return compilation_cache


def problem() -> str | None:
    """Return why JAX's compile cache cannot be given other files; None if it can."""
    module = _module()
    opens = getattr(module, "get_file_cache", None)
    flags = [getattr(module, name, None) for name in ("_cache_checked", "_cache_used")]
    if (
        callable(opens)
        and list(inspect.signature(opens).parameters) == ["path"]
        and callable(getattr(module, "reset_cache", None))
        and all(isinstance(flag, bool) for flag in flags)
    ):
        return None
    return (
        f"jax {jax.__version__} opens its compile cache in another way than earlier releases: "
        "compiled programs are kept in JAX's own files, on its own platforms"
    )


def install(opens: Callable[[str], tuple[Any, str]], *, force: bool) -> None:
    """Have JAX open its cache with `opens`. force: also on a platform that JAX does not list."""
    module = _module()
    module.reset_cache()
    module.get_file_cache = opens
    if force:
        module._cache_checked = True
        module._cache_used = True
