"""Whole runs, started from the shell as a user does: killed, stopped, resumed, on another mesh."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import warm

from llamajax.monitoring import load_events

CONFIG = Path(__file__).with_name("tiny_run.py")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, prepare_texts):
    """Documents of any length, a sentence each: several share a sample."""
    texts = [f"{'abcdefgh' * (i % 7)} line {i} of a small corpus." for i in range(900)]
    return prepare_texts(tmp_path_factory.mktemp("corpus"), texts)


def command(prepared, workdir, *overrides):
    found = [sys.executable, "-m", "llamajax.train", f"--config={CONFIG}:{prepared}"]
    return [*found, f"--workdir={workdir}", *(f"--config.{o}" for o in overrides)]


def run(prepared, workdir, *overrides):
    done = warm.run(
        command(prepared, workdir, *overrides), stderr=subprocess.PIPE, text=True, timeout=300
    )
    return done.returncode, done.stderr


def interrupted(prepared, workdir, number, *overrides, after_step, stderr=None):
    """Exit code and stderr of a run that gets signal `number` once `after_step` is logged."""
    metrics, poll = workdir / "metrics.jsonl", threading.Event()
    with (
        open("/dev/full", "w") as full,
        warm.Popen(
            command(prepared, workdir, *overrides),
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


def ordered(rows):
    return sorted(rows, key=lambda row: (row["step"], "eval_loss" in row))


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, text = run(prepared, workdir)
    assert code == 0, text
    return workdir


def test_a_run_learns_and_leaves_what_the_contract_says(undisturbed):
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
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


def test_finished_runs_are_left_alone(prepared, undisturbed):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    code, text = run(prepared, undisturbed)
    assert code == 0, text
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


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
    prepared, undisturbed, logged, tmp_path, number, stderr, rng
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
    code, text = run(prepared, tmp_path)
    assert code == 0, text
    assert ordered(logged(tmp_path)) == ordered(logged(undisturbed))


def test_a_signal_before_the_first_update_names_the_previous_checkpoint(prepared, tmp_path):
    with warm.Popen(command(prepared, tmp_path), stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("steps"):  # printed before compilation
                process.terminate()
                break
        rest = process.stderr.read()
    assert process.returncode == 143
    assert "stopped before the first update" in rest
    assert "none yet" in rest


def test_another_mesh_continues_with_the_same_samples(prepared, undisturbed, logged, tmp_path):
    mesh = ("backend.num_cpu_devices=4", "mesh.fsdp=2", "mesh.tensor=2", "mesh.data=1")
    code, text = interrupted(prepared, tmp_path, signal.SIGTERM, after_step=9)
    assert code == 143, text
    code, text = run(prepared, tmp_path, *mesh)
    assert code == 0, text
    assert "changed since step" in text
    changed = [e["overrides"] for e in load_events(tmp_path) if e["event"] == "start"][-1]
    assert changed["mesh.fsdp"] == ["1", "2"]
    for ours, theirs in zip(ordered(logged(tmp_path)), ordered(logged(undisturbed)), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)


def test_mistakes_exit_2_with_one_message(prepared, undisturbed, tmp_path):
    for overrides, words in (
        (("model.hidden_size=64",), "of another model"),
        (("mesh.tensor=3",), "does not make"),
        (("model.vocab_size=100",), "model.vocab_size"),
        (("data.path=/nowhere",), "/nowhere"),
        (("backend.name=npu",), "did not come up"),
        (("train.steps=10",), "beyond train.steps"),
        (("train.attention=cudnn",), "cudnn"),
        (("train.stepz=10", "optim.beta1=two"), "train.steps"),
    ):
        workdir = undisturbed if "of another" in words or "beyond" in words else tmp_path
        code, text = run(prepared, workdir, *overrides)
        assert code == 2, (overrides, text)
        assert words in text
        assert "Traceback" not in text


def test_a_damaged_checkpoint_is_kept_aside(prepared, undisturbed, logged, tmp_path):
    code, _ = interrupted(prepared, tmp_path, signal.SIGTERM, after_step=9)
    assert code == 143
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    files = [p for p in (tmp_path / "checkpoints" / str(steps[-1])).rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    code, text = run(prepared, tmp_path)
    assert code == 0, text
    assert largest.name in text
    assert list((tmp_path / "checkpoints").glob(f"{steps[-1]}*damaged*"))
    assert logged(tmp_path) == logged(undisturbed)
