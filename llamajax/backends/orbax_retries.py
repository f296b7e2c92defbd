"""How long Orbax waits for an object store that is gone.

What it opens TensorStore with is a private table of its own, without a public way to it: read in
Orbax 0.12, and left alone in others. A save then takes minutes to give up, and is not wrong.
"""

import importlib
from collections.abc import Mapping
from importlib.metadata import version

CHECKED_RELEASES = ("0.12.",)

_TABLES = ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT")


def limit_gcs_retries(retries: Mapping[str, int | str]) -> bool:
    """Have Orbax retry requests to `gs://` so often; whether this release lets us.

    retries: TensorStore's `gcs_request_retries` (max_retries, initial_delay, max_delay).
    """
    if not version("orbax-checkpoint").startswith(CHECKED_RELEASES):
        return False
    private = importlib.import_module("orbax.checkpoint._src.serialization.tensorstore_utils")
    for name in _TABLES:
        getattr(private, name)["gcs_request_retries"] = dict(retries)
    return True
