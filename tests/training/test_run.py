"""Whole runs, started from the shell as a user does: killed, stopped, resumed, on another mesh."""

import json
import os
import signal
import subprocess
import threading

import pytest
import warm
from shell import train_command
from tiny_state import flip
from workdirs import logged, prepare_texts, read_rows

from llamajax.monitoring import load_events


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Documents of any length, a sentence each: several share a sample."""
    texts = [f"{'abcdefgh' * (i % 7)} line {i} of a small corpus." for i in range(900)]
    return prepare_texts(tmp_path_factory.mktemp("corpus"), texts)


def run(prepared, workdir, **keys):
    """Exit code and stderr of a run; keys: of its config, with __ for a point."""
    keys = {key.replace("__", "."): value for key, value in keys.items()}
    command = train_command(prepared, workdir, keys)
    done = warm.run(command, stderr=subprocess.PIPE, text=True, timeout=300)
    return done.returncode, done.stderr


def interrupted(prepared, workdir, number, *, after_step, stderr=None, keys=()):
    """Exit code and stderr of a run that gets signal `number` once `after_step` rows are logged."""
    metrics, poll = workdir / "metrics.jsonl", threading.Event()
    with (
        open("/dev/full", "w") as full,
        warm.Popen(
            train_command(prepared, workdir, dict(keys)),
            stderr=full if stderr == "full" else subprocess.PIPE,
            text=True,
        ) as process,
    ):
        if stderr == "gone":
            process.stderr.close()
        while process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b'"loss"') >= after_step:
                os.kill(process.pid, number)
                break
            poll.wait(0.005)
        text = "" if stderr else process.stderr.read()
    return process.returncode, text


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, text = run(prepared, workdir)
    assert code == 0, text
    return workdir


def test_a_run_learns_and_leaves_what_the_contract_says(undisturbed):
    rows = read_rows(undisturbed / "metrics.jsonl")
    train = [row for row in rows if "loss" in row]
    assert [row["step"] for row in train] == list(range(1, 61))
    assert train[-1]["loss"] < train[0]["loss"] - 1
    assert train[-1]["tokens_seen"] == 60 * 8 * 48
    assert {row["mfu_full"] for row in train} == {None}  # a CPU has no known peak
    assert [row["step"] for row in rows if "eval_loss" in row] == [15, 30, 45, 60]
    assert (undisturbed / "checkpoints" / "60").is_dir()
    assert (undisturbed / "report.html").is_file()
    assert json.loads((undisturbed / "config.json").read_text())["train"]["steps"] == 60
    facts = json.loads((undisturbed / "run.json").read_text())
    assert (facts["lost_features"], facts["untested_versions"]) == ({}, [])


@pytest.mark.parametrize(
    ("number", "stderr"),
    [
        (signal.SIGKILL, None),
        (signal.SIGHUP, None),
        (signal.SIGUSR2, "full"),
        (signal.SIGINT, "gone"),
    ],
)
def test_an_interrupted_run_continues_bit_by_bit(
    prepared, undisturbed, tmp_path, number, stderr, rng
):
    """stderr: a log on a full disk, or a pipe to a `tee` that is gone, as after Ctrl-C."""
    step = rng.randint(1, 40)
    code, text = interrupted(prepared, tmp_path, number, after_step=step, stderr=stderr)
    assert code == (-9 if number == signal.SIGKILL else 143), (step, text)
    if number != signal.SIGKILL:
        assert stderr or "stopping: finishing this step" in text
        signals = [event for event in load_events(tmp_path) if event["event"] == "signal"]
        assert [event["signal"] for event in signals] == [signal.Signals(number).name]
        newest = max(row["step"] for row in logged(tmp_path))
        assert (tmp_path / "checkpoints" / str(newest)).is_dir()
    if stderr is None:
        code, text = run(prepared, tmp_path)
        assert code == 0, text
    rows = logged(tmp_path)
    assert rows == logged(undisturbed)[: len(rows) if stderr else None]


def test_a_fork_goes_on_as_the_run_it_left(prepared, undisturbed, tmp_path):
    step = min(int(path.name) for path in (undisturbed / "checkpoints").iterdir())
    keys = {"train.fork": f"{undisturbed}@{step}", "checkpoint.every_steps": 100}
    code, text = interrupted(prepared, tmp_path, signal.SIGKILL, after_step=2, keys=keys)
    assert code == -9, text
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
    keys = {key.replace(".", "__"): value for key, value in keys.items()}
    code, text = run(prepared, tmp_path, **keys)
    assert (code, f"forked from {undisturbed}/checkpoints/{step}" in text) == (0, True), text
    rows = [row for row in logged(undisturbed) if row["step"] > step]
    assert logged(tmp_path) == rows
    begun = [event["fork"] for event in load_events(tmp_path) if event["event"] == "start"]
    origin = json.loads((tmp_path / "run.json").read_text())["origin"]
    assert begun == [origin, origin]
    assert (origin["run"], origin["step"]) == (str(undisturbed), step)
    assert origin["changed"] == {"checkpoint.every_steps": ["4", "100"]}


def test_a_signal_before_the_first_update_names_the_previous_checkpoint(prepared, tmp_path):
    command = train_command(prepared, tmp_path, {})
    with warm.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("steps"):  # printed before compilation
                process.terminate()
                break
        rest = process.stderr.read()
    assert process.returncode == 143
    assert "stopped before the first update" in rest
    assert "none yet" in rest


def test_another_mesh_continues_with_the_same_samples(prepared, undisturbed, tmp_path):
    mesh = {"backend__num_cpu_devices": 4, "mesh__fsdp": 2, "mesh__tensor": 2, "mesh__data": 1}
    code, text = interrupted(prepared, tmp_path, signal.SIGTERM, after_step=9)
    assert code == 143, text
    code, text = run(prepared, tmp_path, **mesh)
    assert code == 0, text
    assert "changed since step" in text
    changed = [e["overrides"] for e in load_events(tmp_path) if e["event"] == "start"][-1]
    assert changed["mesh.fsdp"] == ["1", "2"]
    for ours, theirs in zip(logged(tmp_path), logged(undisturbed), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)


def test_a_damaged_checkpoint_is_kept_aside(prepared, undisturbed, tmp_path):
    code, _ = interrupted(prepared, tmp_path, signal.SIGTERM, after_step=9)
    assert code == 143
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    damaged = flip(tmp_path / "checkpoints" / str(steps[-1]))
    code, text = run(prepared, tmp_path)
    assert code == 0, text
    assert damaged.name in text
    assert list((tmp_path / "checkpoints").glob(f"{steps[-1]}*damaged*"))
    assert logged(tmp_path) == logged(undisturbed)
