"""Orbax's private tables of TensorStore options.

They decide how long a save waits for a lost object store, and whether a clock that is set back can
keep it waiting. Without them a save is slower to give up. It is not wrong.
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
    """Return why Orbax's options cannot be set; None if they can."""
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
        "earlier releases: a save takes minutes to give up when the object store is gone, and may "
        "wait for as long as the wall clock is set back"
    )


def set_options(options: Mapping[str, Mapping[str, int | str]]) -> bool:
    """Have Orbax open TensorStore with these options; False if this release has no way to say so.

    options: entries of a TensorStore context, such as `gcs_request_retries`.
    """
    if problem():
        return False
    module = _module()
    for name in _TABLES:
        getattr(module, name).update({key: dict(value) for key, value in options.items()})
    return True
