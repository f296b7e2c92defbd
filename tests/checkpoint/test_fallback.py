"""A damaged newest checkpoint costs its steps, never the run, and is kept aside."""

import os
from pathlib import Path

import numpy as np
import pytest
from test_damage import edit_meta, empty, flip, remove, remove_manifest, truncate
from tiny_state import (
    abstract,
    assert_same_bits,
    checkpointer,
    make_mesh,
    make_state,
    newest,
    restore,
)

from llamajax.errors import UserError


@pytest.mark.parametrize("damage", [truncate, flip, remove, remove_manifest, edit_meta, empty])
def test_the_newest_whole_checkpoint_is_found_and_the_damaged_kept_aside(copy: Path, damage):
    path, mesh = damage(copy / "20"), make_mesh((1, 1))
    with checkpointer(copy, keep=1) as run:
        step, words = newest(run)
        assert step == 10
        assert f"{path} " in words[0]
        assert "steps 11 to 20 are done again" in words[1]
        assert sorted(os.listdir(copy)) == ["10", "20.damaged"]
        restored = restore(copy, abstract(make_state(mesh), mesh), step)
        assert_same_bits(restored, make_state(mesh, seed=1))
        run.save(20, {"x": np.int32(1)}, meta={})
    assert sorted(os.listdir(copy)) == ["20", "20.damaged"]


def test_nothing_is_said_or_moved_where_all_is_well(copy: Path, tmp_path: Path):
    with checkpointer(copy) as run:
        assert newest(run) == (20, [])
    assert sorted(os.listdir(copy)) == ["10", "20"]
    with checkpointer(tmp_path / "none") as run:
        assert newest(run) == (None, [])


def test_all_damaged_is_an_error_and_nothing_is_moved(copy: Path):
    flip(copy / "20")
    flip(copy / "10")
    with checkpointer(copy) as run, pytest.raises(UserError, match="no earlier complete"):
        run.newest_intact()
    assert sorted(os.listdir(copy)) == ["10", "20"]


def test_a_second_damage_of_the_same_step_takes_another_name(copy: Path):
    (copy / "20.damaged").mkdir()
    truncate(copy / "20")
    with checkpointer(copy) as run:
        assert newest(run)[0] == 10
    assert sorted(os.listdir(copy)) == ["10", "20.damaged", "20.damaged.2"]
