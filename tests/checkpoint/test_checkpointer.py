"""A checkpoint gives back every bit on any mesh, or says clearly why not."""

import errno
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_state import (
    META,
    Model,
    abstract,
    assert_same_bits,
    checkpointer,
    make_mesh,
    make_state,
    restore,
)

from llamajax.checkpoint import (
    CheckpointError,
    complete_steps,
    named_leaves,
    newest_checkpoint,
    open_checkpoint,
    restore_state,
)
from llamajax.checkpoint import manifest as manifests

ONE = {"x": np.int32(1)}


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_names_say_where_a_weight_is():
    names = list(named_leaves(make_state((1, 1))))
    assert {"model/blocks/wq", "opt_state/1/mu/blocks/wq", "step"} <= set(names)
    with pytest.raises(ValueError, match="both named 'a/0'"):
        named_leaves({"a": [1], "a/0": 2})


@pytest.mark.parametrize("shape", [(4, 2), (1, 1), (2, 4), (8, 1), (1, 3)])
def test_restored_onto_any_mesh_bit_for_bit(saved: Path, shape: tuple[int, int]):
    state = make_state((4, 2), seed=2)
    newest = newest_checkpoint(saved)
    assert (newest.step, newest.meta) == (20, META | {"later": True})
    restored = restore_state(newest, abstract(state, shape), model=META["config"]["model"])
    assert_same_bits(restored, state)
    assert isinstance(restored.model, Model)
    wq = restored.model.blocks.wq.get_value()
    assert wq.sharding == NamedSharding(make_mesh(shape), P("fsdp", "tensor"))


def test_an_older_step_and_a_part_of_the_state(saved: Path):
    model = make_state((2, 1), seed=1).model
    restored = restore(saved, {"model": abstract(model, (2, 1))}, 10, partial=True)
    assert_same_bits(restored, {"model": model})
    index = open_checkpoint(saved / "10").arrays
    assert index["model/blocks/wq"] == jax.ShapeDtypeStruct((16, 24), jnp.bfloat16)


def test_python_numbers_are_stored_as_tracing_sees_them(tmp_path: Path):
    with checkpointer(tmp_path) as saver:
        saver.save(1, {"n": 3, "x": 0.5}, meta={})
    restored = restore(tmp_path, jax.eval_shape(lambda: {"n": 3, "x": 0.5}))
    assert_same_bits(restored, {"n": np.int32(3), "x": np.float32(0.5)})
    assert isinstance(restored["n"], np.ndarray)  # without a sharding


def test_what_cannot_be_stored_writes_nothing(tmp_path: Path):
    with checkpointer(tmp_path) as saver:
        with pytest.raises(TypeError, match="not JSON serializable"):
            saver.save(1, ONE, meta={"a": object()})
        with pytest.raises(TypeError, match=r"rng is a typed PRNG key; keep jax.random.key_data"):
            saver.save(1, {"rng": jax.random.key(0)}, meta={})
        saver.wait()
    assert names(tmp_path) == []


def test_a_save_is_safe_from_donation_of_the_state(tmp_path: Path):
    """The loop donates the buffers to the next steps while the files are still being written."""
    sharding = NamedSharding(make_mesh((8, 1)), P("fsdp"))
    state = {"w": jax.device_put(np.arange(2**22, dtype=np.float32), sharding)}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any) -> Any:
        return jax.tree.map(lambda x: x * jnp.float32(-2), state)

    state = step(state)
    with checkpointer(tmp_path) as saver:
        saver.save(1, state, meta={})
        for _ in range(5):
            state = jax.block_until_ready(step(state))
        saver.wait()
    restored = restore(tmp_path, {"w": jax.ShapeDtypeStruct((2**22,), jnp.float32)})
    assert np.array_equal(restored["w"], np.arange(2**22, dtype=np.float32) * -2)


@pytest.mark.parametrize(
    ("options", "steps", "kept"),
    [
        ({"keep": 2}, range(1, 6), [4, 5]),
        ({"keep": 1}, range(1, 4), [3]),
        ({"keep": 1, "keep_every": 2, "asynchronous": False}, range(1, 6), [2, 4, 5]),
    ],
)
def test_retention(tmp_path: Path, options: dict, steps: range, kept: list[int]):
    with checkpointer(tmp_path, **options) as saver:
        for step in steps:
            saver.save(step, ONE, meta={})
        saver.wait()
        assert saver.steps() == kept
    assert names(tmp_path) == sorted(map(str, kept))


def test_a_complete_step_is_not_written_again(copy: Path):
    before = (copy / "20" / "manifest.json").stat().st_mtime_ns
    with checkpointer(copy) as saver:
        saver.save(20, ONE, meta={})
    assert (copy / "20" / "manifest.json").stat().st_mtime_ns == before


def test_leftovers_go_at_the_next_start_and_nothing_else(copy: Path):
    others = ["20.damaged", "notes", "x.orbax-checkpoint-tmp"]
    for name in ["30.orbax-checkpoint-tmp", "5.removing", *others]:
        (copy / name / "state").mkdir(parents=True)
    with checkpointer(copy) as loader:
        assert loader.steps() == [10, 20]
    assert names(copy) == sorted(["10", "20", *others])


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_save_surfaces_later_and_can_be_repeated(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with checkpointer(copy, keep=1) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(manifests, "write_durably", refuse)
            saver.save(30, ONE, meta={})
            with pytest.raises(CheckpointError, match=r"step 30 was not saved.*No space left.*20"):
                saver.wait()
            saver.save(30, ONE, meta={})
            with pytest.raises(CheckpointError, match="step 30 was not saved"):
                saver.save(40, ONE, meta={})
        assert names(copy) == ["10", "20"]
        saver.save(40, ONE, meta={})
        saver.wait()
        assert saver.steps() == [40]
    # Orbax itself would log the same error with tracebacks, from several threads.
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_directory_that_cannot_be_made(tmp_path: Path):
    with checkpointer(tmp_path / "checkpoints") as saver:
        (tmp_path / "checkpoints").write_text("in the way")
        with pytest.raises(CheckpointError, match=r"step 1 was not saved: .*there is none yet"):
            saver.save(1, ONE, meta={})
        (tmp_path / "checkpoints").unlink()
        saver.save(1, ONE, meta={}, wait=True)
        assert complete_steps(tmp_path / "checkpoints") == [1]


def test_a_save_that_the_disk_has_no_room_for_does_not_begin(
    copy: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(copy)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=399))
    with checkpointer(copy) as saver:
        with pytest.raises(CheckpointError, match=r"400 bytes are needed, 399 are free.*20"):
            saver.save(30, {"x": np.zeros(100, np.float32)}, meta={})
        assert names(copy) == ["10", "20"]
        saver.save(30, {"x": np.zeros(99, np.float32)}, meta={}, wait=True)
        assert saver.steps() == [10, 20, 30]


def test_meta_and_state_commit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever is visible under its step's name has everything: manifest last, then one rename."""
    seen, seal = [], manifests.seal

    def watch(directory: Path, **rest: Any) -> None:
        seen.append((directory.name, (directory / "meta.json").is_file(), complete_steps(tmp_path)))
        seal(directory, **rest)

    monkeypatch.setattr(manifests, "seal", watch)
    with checkpointer(tmp_path) as saver:
        saver.save(1, ONE, meta={"position": 5}, wait=True)
    assert seen == [("1.orbax-checkpoint-tmp", True, [])]
    assert open_checkpoint(tmp_path / "1").meta == {"position": 5}
    listed = json.loads((tmp_path / "1" / "manifest.json").read_text())["files"]
    on_disk = {p.relative_to(tmp_path / "1").as_posix() for p in (tmp_path / "1").rglob("*")}
    assert {name for name in on_disk if name.startswith("state/d")} - set(listed) == {"state/d"}
    assert "meta.json" in listed
