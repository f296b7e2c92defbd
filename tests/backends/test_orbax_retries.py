"""Orbax gives up on a store that is gone when we say so."""

import pytest
import tensorstore as ts
from orbax.checkpoint._src.serialization import tensorstore_utils

from llamajax.backends.jax_private import orbax_retries

RETRIES = {"max_retries": 3, "initial_delay": "2s", "max_delay": "3s"}


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    for name in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):
        table = dict(getattr(tensorstore_utils, name))
        table.pop("gcs_request_retries", None)  # of a test before this one
        monkeypatch.setattr(tensorstore_utils, name, table)


@pytest.mark.parametrize("use_ocdbt", [False, True])
def test_the_installed_orbax_opens_tensorstore_with_our_limit(use_ocdbt):
    assert orbax_retries.limit_gcs_retries(RETRIES)
    context = tensorstore_utils.get_ts_context(use_ocdbt=use_ocdbt)
    assert isinstance(context, ts.Context)
    assert context["gcs_request_retries"].to_json() == RETRIES


def test_tables_that_have_changed_are_left_alone(monkeypatch):
    assert orbax_retries.problem() is None
    monkeypatch.delattr(tensorstore_utils, "_DEFAULT_OCDBT_TS_CONTEXT")
    assert "takes minutes to give up" in orbax_retries.problem()
    assert not orbax_retries.limit_gcs_retries(RETRIES)
    assert "gcs_request_retries" not in tensorstore_utils._BASE_TS_CONTEXT
