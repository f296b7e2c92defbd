"""What cannot be trusted, or belongs to another model, is refused before anything is read.

The run itself goes on from an earlier checkpoint and keeps the damaged one aside.
"""

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusal import refused
from tiny_state import (
    abstract,
    assert_same_bits,
    checkpointer,
    edit_manifest,
    edit_meta,
    empty,
    flip,
    make_state,
    newest,
    remove,
    remove_manifest,
    restore,
    truncate,
)

from llamajax.checkpoint import named_leaves, newest_checkpoint, open_checkpoint

ONE = (1, 1)
UNREAD = (truncate, remove, empty)  # seen without reading the file
DAMAGES = [*UNREAD, flip, remove_manifest, edit_manifest, edit_meta]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_run_goes_back_to_the_one_before(copy, damage):
    path, state = damage(copy / "20"), abstract(make_state(ONE), ONE)
    fix = f": mv {copy / '20'} {copy / '20'}.damaged"
    with refused(f"{path} ", f"previous complete checkpoint is {copy / '10'}", fix):
        restore(copy, state)
    with checkpointer(copy, keep=1) as run:
        if damage in UNREAD:
            assert run.steps() == [10]
            with refused("is damaged"):
                newest_checkpoint(copy)
        step, words = newest(run)
        assert step == 10
        assert f"{path} " in words[0]
        assert "steps 11 to 20 are done again" in words[1]
        assert sorted(os.listdir(copy)) == ["10", "20.damaged"]
        assert_same_bits(restore(copy, state), make_state(ONE, seed=1))
        run.save(20, {"x": np.int32(1)}, meta={})
    assert sorted(os.listdir(copy)) == ["20", "20.damaged"]


def test_nothing_is_said_or_moved_where_all_is_well(copy: Path, tmp_path: Path):
    with checkpointer(copy) as run:
        assert newest(run) == (20, [])
    assert sorted(os.listdir(copy)) == ["10", "20"]
    assert newest_checkpoint(tmp_path / "none") is None
    with checkpointer(tmp_path / "none") as run:
        assert (newest(run), run.steps()) == ((None, []), [])
    with refused("complete ones are 10, 20"):
        open_checkpoint(copy / "15")


def test_all_damaged_is_an_error_and_nothing_is_moved(copy: Path):
    flip(copy / "20")
    flip(copy / "10")
    with checkpointer(copy) as run, refused("no earlier complete", unchanged=(copy,)):
        run.newest_intact()
    shutil.rmtree(copy / "10")
    truncate(copy / "20")
    with refused("no earlier complete"):
        newest_checkpoint(copy)


def test_a_second_damage_of_the_same_step_takes_another_name(copy: Path):
    (copy / "20.damaged").mkdir()
    truncate(copy / "20")
    with checkpointer(copy) as run:
        assert newest(run)[0] == 10
    assert sorted(os.listdir(copy)) == ["10", "20.damaged", "20.damaged.2"]


def test_another_model_is_refused_with_every_difference(saved: Path):
    leaves = named_leaves(abstract(make_state(ONE), ONE))
    leaves["model/blocks/wq"] = jax.ShapeDtypeStruct((16, 32), jnp.bfloat16)
    leaves["step"] = jax.ShapeDtypeStruct((), jnp.uint32)
    leaves["extra"] = leaves.pop("opt_state/1/count")
    with refused(
        "model.hidden_size: the weights have 16, this run 8; use --config.model",
        "model/blocks/wq: the checkpoint has bfloat16[16, 24], this run bfloat16[16, 32]",
        "step: the checkpoint has int32[], this run uint32[]",
        "extra: not in the checkpoint",
        "opt_state/1/count: only in the checkpoint",
    ) as lines:
        restore(saved, leaves, 20, model={"hidden_size": 8, "name": "other"})
    assert "name" not in "".join(lines)
    wanted = {f"w{i}": jax.ShapeDtypeStruct((1,), jnp.float32) for i in range(30)}
    with refused("and 20 more") as lines:
        restore(saved, wanted, 20, partial=True)
    assert len(lines) == 12
