"""What cannot be trusted, or belongs to another model, is refused before anything is read."""

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_state import abstract, assert_same_bits, checkpointer, make_mesh, make_state, restore

from llamajax.checkpoint import (
    named_leaves,
    newest_checkpoint,
    open_checkpoint,
)
from llamajax.errors import UserError


def big_file(directory: Path) -> Path:
    files = [path for path in (directory / "state").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(directory: Path) -> Path:
    path = big_file(directory)
    os.truncate(path, path.stat().st_size - 1)
    return path


def flip(directory: Path) -> Path:
    path = big_file(directory)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def remove(directory: Path) -> Path:
    path = big_file(directory)
    path.unlink()
    return path


def remove_manifest(directory: Path) -> Path:
    (directory / "manifest.json").unlink()
    return directory / "manifest.json"


def edit_manifest(directory: Path) -> Path:
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace("bfloat16", "float16"))
    return path


def edit_meta(directory: Path) -> Path:
    path = directory / "meta.json"
    path.write_text(path.read_text().replace("tiny", "tidy"))
    return path


def empty(directory: Path) -> Path:
    shutil.rmtree(directory)
    directory.mkdir()
    return directory / "manifest.json"


@pytest.mark.parametrize(
    "damage", [truncate, flip, remove, remove_manifest, edit_manifest, edit_meta, empty]
)
def test_a_damaged_checkpoint_is_refused_and_the_previous_named(copy: Path, damage):
    path = damage(copy / "20")
    state = abstract(make_state(make_mesh((1, 1))), make_mesh((1, 1)))
    with checkpointer(copy) as loader:
        with pytest.raises(UserError) as refused:
            restore(copy, state)
        message = str(refused.value)
        assert f"{path} " in message
        assert f"previous complete checkpoint is {copy / '10'}" in message
        (command,) = [line for line in message.splitlines() if ": mv " in line]
        source, target = command.split(": mv ")[1].split()
        Path(source).rename(target)
        assert_same_bits(restore(copy, state), make_state(make_mesh((1, 1)), seed=1))
        loader.save(20, {"x": np.int32(1)}, meta={})


@pytest.mark.parametrize("damage", [truncate, remove, empty])
def test_what_is_seen_without_reading_is_seen_at_once(copy: Path, damage):
    damage(copy / "20")
    with checkpointer(copy) as loader:
        assert loader.steps() == [10]
        with pytest.raises(UserError, match="is damaged"):
            newest_checkpoint(copy)


def test_the_only_checkpoint_damaged(copy: Path):
    shutil.rmtree(copy / "10")
    truncate(copy / "20")
    with pytest.raises(UserError, match="no earlier complete"):
        newest_checkpoint(copy)


def test_no_checkpoint(tmp_path: Path, copy: Path):
    assert newest_checkpoint(tmp_path / "none") is None
    with checkpointer(tmp_path / "none") as loader:
        assert loader.steps() == []
    with pytest.raises(UserError, match="complete ones are 10, 20"):
        open_checkpoint(copy / "15")


def test_another_model_is_refused_with_every_difference(saved: Path):
    state = abstract(make_state(make_mesh((1, 1))), make_mesh((1, 1)))
    leaves = named_leaves(state)
    leaves["model/blocks/wq"] = jax.ShapeDtypeStruct((16, 32), jnp.bfloat16)
    leaves["step"] = jax.ShapeDtypeStruct((), jnp.uint32)
    leaves["extra"] = leaves.pop("opt_state/1/count")
    with pytest.raises(UserError) as refused:
        restore(saved, leaves, 20, model={"hidden_size": 8, "name": "other"})
    message = str(refused.value)
    assert "model.hidden_size: the weights have 16, this run 8; use --config.model" in message
    assert "name" not in message
    assert "model/blocks/wq: the checkpoint has bfloat16[16, 24], this run bfloat16[16, 32]" in (
        message
    )
    assert "step: the checkpoint has int32[], this run uint32[]" in message
    assert "extra: not in the checkpoint" in message
    assert "opt_state/1/count: only in the checkpoint" in message


def test_many_differences_are_counted(saved: Path):
    wanted = {f"w{i}": jax.ShapeDtypeStruct((1,), jnp.float32) for i in range(30)}
    with pytest.raises(UserError) as refused:
        restore(saved, wanted, 20, partial=True)
    assert len(str(refused.value).splitlines()) == 12
    assert "and 20 more" in str(refused.value)
