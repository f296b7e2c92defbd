"""A start goes on from what was saved, or says why not; nothing saved is lost without a word."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from refusal import refused
from workdirs import logged, save_checkpoint, write_rows

from llamajax.checkpoint import Checkpointer, complete_steps, manifest
from llamajax.checkpoint.directory_owner import checkpoint_directory
from llamajax.checkpoint.location import locate
from llamajax.errors import TransientError
from llamajax.monitoring.run_history import History
from llamajax.training.resume import choose_checkpoint, newest_save, requested_start, set_aside


def event(name: str, step: int, **fields) -> dict:
    return {"event": name, "step": step, "time_s": 1.0} | fields


@pytest.mark.parametrize(
    ("events", "newest"),
    [
        ([event("start", 0)], None),
        ([event("start", 0), event("save", 4), event("save", 8)], 8),
        ([event("save", 4), event("save", 8, error="disk full")], 4),
        ([event("save", 4), event("save", 8), event("start", 4)], 4),
        ([event("save", 4), event("save", 8), event("rollback", 9, to_step=4)], 4),
        ([event("save", 4), event("rollback", 5, to_step=0)], None),
        ([event("start", 4, fork={"step": 4})], None),
        ([event("start", 4, fork={"step": 4}), event("save", 8), event("start", 8)], 8),
        (
            [
                event("start", 4, fork={"step": 4}),
                event("save", 8),
                event("start", 8),
                event("rollback", 9, to_step=4),
            ],
            None,
        ),
        ([event("save", 4), event("rollback", 5, to_step=0), event("save", 4)], 4),
    ],
)
def test_the_record_names_the_newest_save(tmp_path: Path, events: list[dict], newest: int | None):
    write_rows(tmp_path / "events.jsonl", *events)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "save", "st')  # torn by a crash
    assert newest_save(History.read(tmp_path)) == newest


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A --workdir with checkpoints of steps 2, 4 and 6."""
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, step, {"x": np.int32(step)})
    saves = [event("save", step) for step in (2, 4, 6)]
    write_rows(tmp_path / "events.jsonl", event("start", 0), *saves)
    write_rows(tmp_path / "metrics.jsonl", *({"step": step} for step in range(1, 8)))
    return tmp_path


def start(config, workdir: Path) -> tuple[int, list[str]]:
    """Where a start continues, and what it says; as `train` does, without training."""
    history, words = History.read(workdir), []
    options = {"keep": 5, "keep_every": None, "asynchronous": False}
    where = checkpoint_directory(workdir, config.checkpoint.directory)
    with Checkpointer(where, **options) as checkpointer:
        run = SimpleNamespace(
            config=config, workdir=workdir, checkpointer=checkpointer, say=words.append
        )
        request = requested_start(run, history)
        found = choose_checkpoint(run, request, history)
        checkpointer.begin()
        set_aside(run, request)
    train = {"restart": config.train.restart, "resume_step": config.train.resume_step}
    write_rows(workdir / "config.json", {"train": train})
    return (0 if found is None else found.step), words


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("gone", ["removed", "empty"])
def test_checkpoints_that_have_gone_are_refused(short_config, used, gone):
    shutil.rmtree(used / "checkpoints")
    if gone == "empty":
        (used / "checkpoints").mkdir()
    with refused("step 6 was saved, and there is none", "restart=true", unchanged=(used,)):
        start(short_config(), used)


def test_the_place_where_they_were_is_named(short_config, used):
    with refused("/mistyped. It was saved in ", "/checkpoints: see"):
        start(short_config(checkpoint__directory=str(used / "mistyped")), used)
    assert not (used / "mistyped").exists()


def test_where_only_newer_ones_are_missing_the_newest_goes_on_and_says_so(short_config, used):
    shutil.rmtree(used / "checkpoints" / "6")
    step, (words,) = start(short_config(), used)
    assert step == 4
    assert "step 6 was saved and is not in" in words
    assert "steps 5 to 6 are done again" in words
    with (used / "events.jsonl").open("a") as file:
        file.write(f"{json.dumps(event('start', 4))}\n")
    assert start(short_config(), used) == (4, [])


def test_where_nothing_was_saved_it_begins_and_says_so(short_config, tmp_path):
    assert start(short_config(), tmp_path) == (0, [])
    write_rows(tmp_path / "metrics.jsonl", {"step": 1}, {"step": 3})
    write_rows(tmp_path / "events.jsonl", event("start", 0))
    step, (words,) = start(short_config(), tmp_path)
    assert (step, words) == (0, "no checkpoint was saved before: all steps to 3 are done again")


def test_a_restart_sets_everything_aside_once(short_config, used, capfd):
    config = short_config(train__restart=True)
    before = {name for name in tree(used) if "/" not in name}
    assert start(config, used) == (0, [])
    aside = used / "before_restart"
    assert f"what was there before is in {aside}" in capfd.readouterr().err
    assert {name for name in tree(aside) if "/" not in name} == before
    assert complete_steps(aside / "checkpoints") == [2, 4, 6]
    assert sorted(path.name for path in used.iterdir()) == ["before_restart", "config.json"]
    save_checkpoint(used, 2, {"x": np.int32(2)})
    assert start(config, used) == (2, [])  # the same command continues
    assert start(short_config(), used) == (2, [])
    assert start(config, used)[0] == 0
    assert complete_steps(used / "before_restart.2" / "checkpoints") == [2]


def test_an_older_checkpoint_is_resumed_once_and_later_ones_set_aside(short_config, used, capfd):
    config = short_config(train__resume_step=2)
    rows = (used / "metrics.jsonl").read_bytes()
    assert start(config, used) == (2, [])
    assert "later checkpoints are set aside: 4, 6" in capfd.readouterr().err
    assert complete_steps(used / "checkpoints") == [2]
    assert complete_steps(used / "checkpoints" / "..") == []
    assert {"4.set_aside", "6.set_aside"} <= {p.name for p in (used / "checkpoints").iterdir()}
    assert (used / "metrics.set_aside.jsonl").read_bytes() == rows
    with (used / "events.jsonl").open("a") as file:
        file.write(f"{json.dumps(event('start', 2))}\n")
    save_checkpoint(used, 3, {"x": np.int32(3)})
    assert start(config, used) == (3, [])
    with refused("no checkpoint ", "/5; ", "complete ones are 2, 3"):
        start(short_config(train__resume_step=5), used)


def test_a_store_that_cannot_be_reached_while_later_ones_are_set_aside_is_worth_a_retry(
    short_config, used, monkeypatch
):
    store = locate("gs://bucket/run")

    def cannot_connect(directory):
        raise OSError("Connection refused")

    monkeypatch.setattr(manifest, "step_directories", cannot_connect)
    run = SimpleNamespace(
        config=short_config(train__resume_step=2),
        workdir=used,
        checkpointer=SimpleNamespace(directory=store),
    )
    with pytest.raises(TransientError, match="cannot be reached: Connection refused"):
        set_aside(run, "older")


def test_a_run_goes_back_to_an_older_checkpoint_and_begins_anew(short_run, tmp_path, capfd):
    assert short_run(tmp_path, train__steps=6) == 0
    whole = logged(tmp_path)
    assert short_run(tmp_path, train__steps=6, train__resume_step=2) == 0
    assert "continuing from step 2" in capfd.readouterr().err
    assert logged(tmp_path) == whole
    shutil.rmtree(tmp_path / "checkpoints")
    with refused("there is none in ", "checkpoints"):
        short_run(tmp_path, train__steps=6)
    assert logged(tmp_path) == whole
    assert short_run(tmp_path, train__steps=6, train__restart=True, stop_after=3) == 143
    assert logged(tmp_path / "before_restart") == whole
    assert short_run(tmp_path, train__steps=6, train__restart=True) == 0
    assert "continuing from step 3" in capfd.readouterr().err
    assert logged(tmp_path) == whole
