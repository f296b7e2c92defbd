"""How Orbax opens TensorStore: its private tables of options, and its private paths of URLs.

The options decide whether a clock that is set back can keep a save waiting. Orbax 0.12 knows only
gs:// among URLs, and asks TensorStore for the default endpoint and number of retries there. Its
module for it has a list of further prefixes, with nothing in it.
"""

import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from types import ModuleType
from typing import Any

_MODULE = "orbax.checkpoint._src.serialization.tensorstore_utils"
_PATHS = "orbax.checkpoint._src.path.gcs_utils"
_TABLES = ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT")


def _module(name: str = _MODULE) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def problem() -> str | None:
    """Return why Orbax's options cannot be set; None if they can."""
    module, paths = _module(), _module(_PATHS)
    tables = [getattr(module, name, None) for name in _TABLES]
    opens = getattr(module, "get_ts_context", None)
    of_urls = [getattr(module, name, None) for name in ("_use_gcs_driver", "_normalize_path")]
    of_urls.append(getattr(paths, "get_kvstore_for_gcs", None))
    if (
        all(isinstance(table, dict) and "file_io_concurrency" in table for table in tables)
        and all(callable(each) for each in of_urls)
        and isinstance(getattr(paths, "_GCS_PATH_PREFIX", None), tuple)
        and callable(opens)
        and "use_ocdbt" in inspect.signature(opens).parameters
    ):
        return None
    return (
        f"orbax-checkpoint {version('orbax-checkpoint')} opens TensorStore in another way than "
        "earlier releases: it cannot save to an object store, and may wait for as long as the wall "
        "clock is set back"
    )


def set_options(options: Mapping[str, Mapping[str, int | str]]) -> bool:
    """Have Orbax open TensorStore with these options; False if this release has no way to say so.

    options: entries of a TensorStore context, such as `file_io_concurrency`.
    """
    if problem():
        return False
    module = _module()
    for name in _TABLES:
        getattr(module, name).update({key: dict(value) for key, value in options.items()})
    return True


def take_urls(kvstore_spec: Callable[[str], dict[str, Any]], schemes: Sequence[str]) -> bool:
    """Have Orbax write to URLs of these schemes; False if this release has no way to do so.

    kvstore_spec: returns TensorStore's spec of a URL.
    """
    if problem():
        return False
    module, paths = _module(), _module(_PATHS)
    prefixes = tuple(f"{scheme}://" for scheme in schemes)

    def normalize(path: str) -> str:
        return path.rstrip("/") if path.startswith(prefixes) else os.path.normpath(path)

    paths._GCS_PATH_PREFIX = prefixes
    paths.get_kvstore_for_gcs = kvstore_spec
    module._use_gcs_driver = lambda path: path.startswith(prefixes)
    module._normalize_path = normalize
    return True
