"""Orbax's private tables of TensorStore options, which decide how long it waits for a lost store.

Without them a save to `gs://` takes minutes to give up. It is not wrong.
"""

import importlib
import inspect
from collections.abc import Mapping
from importlib.metadata import version
from types import ModuleType

_MODULE = "orbax.checkpoint._src.serialization.tensorstore_utils"
_TABLES = ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT")


def _module() -> ModuleType | None:
    try:
        return importlib.import_module(_MODULE)
    except ImportError:
        return None


def problem() -> str | None:
    """Return why Orbax's retries cannot be limited; None if they can."""
    module = _module()
    tables = [getattr(module, name, None) for name in _TABLES]
    opens = getattr(module, "get_ts_context", None)
    if (
        all(isinstance(table, dict) and "file_io_concurrency" in table for table in tables)
        and callable(opens)
        and "use_ocdbt" in inspect.signature(opens).parameters
    ):
        return None
    return (
        f"orbax-checkpoint {version('orbax-checkpoint')} opens TensorStore in another way than "
        "earlier releases: a save takes minutes to give up when the object store is gone"
    )


def limit_gcs_retries(retries: Mapping[str, int | str]) -> bool:
    """Have Orbax retry requests to `gs://` so often; False if this release has no way to say so.

    retries: TensorStore's `gcs_request_retries` (max_retries, initial_delay, max_delay).
    """
    if problem():
        return False
    module = _module()
    for name in _TABLES:
        getattr(module, name)["gcs_request_retries"] = dict(retries)
    return True
