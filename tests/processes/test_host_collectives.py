"""Errors and decisions that several processes share."""

import jax
import numpy as np
import pytest

from llamajax.errors import TransientError, UserError
from llamajax.processes import host_collectives


@pytest.fixture
def as_process(monkeypatch):
    """Plays the collectives of two processes, one after the other, in this one."""
    wire = {}

    def gather(mine):
        wire["text"] = np.maximum(wire.get("text", 0), mine)
        return np.stack([mine, wire["text"]])

    def broadcast(mine):
        if jax.process_index() == 0:
            wire["first"] = mine
        return wire["first"]

    def become(rank: int) -> None:
        monkeypatch.setattr(jax, "process_index", lambda: rank)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(host_collectives.multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(host_collectives.multihost_utils, "broadcast_one_to_all", broadcast)
    return become


@pytest.mark.parametrize("kind", [UserError, TransientError])
def test_an_error_keeps_its_type_on_the_other_processes(kind, as_process):
    host_collectives.raise_together(None)
    for error in (kind("the bucket: no"), None):
        with pytest.raises(UserError, match=r"^the bucket: no$") as raised:
            host_collectives.raise_together(error)
        assert raised.type is kind


@pytest.mark.parametrize("value", [None, 0, 3, True, "newest", ["donation"]])
def test_process_0_decides_for_all(as_process, value):
    as_process(0)
    assert host_collectives.broadcast_from_first(lambda: value) == value
    as_process(1)
    assert host_collectives.broadcast_from_first(lambda: pytest.fail("it ran")) == value


def test_an_error_of_process_0_is_raised_on_all(as_process):
    def refuse():
        raise UserError("no")

    for rank, decide in enumerate((refuse, lambda: pytest.fail("it ran"))):
        as_process(rank)
        with pytest.raises(UserError, match=r"^no$"):
            host_collectives.broadcast_from_first(decide)
