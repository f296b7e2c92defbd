"""Checkpoints under paths of any characters are read back, or refused from the start."""

import os
from pathlib import Path

import numpy as np
import pytest
from etils.epath import backend
from refusal import refused
from tiny_state import abstract, assert_same_bits, checkpointer, make_state, restore

from llamajax.backends.jax_private import literal_glob
from llamajax.checkpoint import CheckpointError
from llamajax.checkpoint.directory_owner import checkpoint_directory
from llamajax.checkpoint.location import check_usable
from llamajax.formats.weights import open_weights

ODD = ["50% off", "a%41b", "run[1]", "x[a-c]", "two words", "a#b?c=d&e", "ü 日本 é", "a|b:c*"]


@pytest.mark.parametrize("name", [*ODD, "{1,2}", "up/../run"])
def test_what_is_saved_under_an_odd_path_is_restored(tmp_path: Path, name: str):
    (tmp_path / "up").mkdir()
    directory, state = checkpoint_directory(tmp_path / name, None), make_state((2, 1), seed=3)
    with checkpointer(directory) as saver:
        saver.save(5, state, meta={"config": {}}, wait=True)
    assert_same_bits(restore(directory, abstract(state, (2, 1))), state)
    with refused("does not say which model"):
        open_weights(tmp_path / name)  # it was found, and read as far as that


def test_what_cannot_be_read_back_is_not_called_complete(tmp_path: Path, monkeypatch):
    """As with an etils that searches in another way: Orbax then commits what nobody can read."""
    monkeypatch.setattr(literal_glob, "problem", lambda: "changed")
    if "glob" in vars(backend.os_backend):
        monkeypatch.delattr(backend.os_backend, "glob")
    with checkpointer(tmp_path / "run[1]") as saver:
        with pytest.raises(CheckpointError, match="step 1 was not saved: NOT_FOUND"):
            saver.save(1, {"w": np.zeros(3)}, meta={}, wait=True)
        assert saver.steps() == []
    assert list((tmp_path / "run[1]").iterdir()) == []


@pytest.mark.parametrize("name", ["back\\slash", os.fsdecode(b"latin\xe9")])
def test_a_path_that_cannot_work_is_named(tmp_path: Path, name: str):
    with refused("no checkpoint can be written there"):
        check_usable(tmp_path / name)
    check_usable(tmp_path)
