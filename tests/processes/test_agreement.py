"""Errors that several processes raise together."""

import jax
import numpy as np
import pytest

from llamajax.errors import TransientError, UserError
from llamajax.processes import agreement


@pytest.mark.parametrize("kind", [UserError, TransientError])
def test_an_error_keeps_its_type_on_the_other_processes(kind, monkeypatch):
    """As two processes see it: this one has no error, or the same."""
    text = np.zeros(1024, np.uint8)

    def gather(mine):
        text[:] = np.maximum(text, mine)
        return np.stack([mine, text])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement.multihost_utils, "process_allgather", gather)
    agreement.raise_together(None)
    for error in (kind("the bucket: no"), None):
        with pytest.raises(UserError, match=r"^the bucket: no$") as raised:
            agreement.raise_together(error)
        assert raised.type is kind
