"""The record of whole runs, in this process: ends, deaths, a finished run, a folder that goes."""

import collections
import contextlib
import gc
import json
import shutil
import subprocess
import sys
import threading

import jax
import pytest
from compilers import needs_cuda
from refusal import refused, snapshot
from workdirs import read_rows, write_rows

from llamajax.backends import CompilerOptions, absent_devices
from llamajax.monitoring import StepTimer, load_events, read_run_facts, write_report
from llamajax.monitoring.events import EVENTS
from llamajax.monitoring.run_history import History
from llamajax.planning.compilation import abstract_step, lowered_step
from llamajax.training import attempt, loop, run, setup
from llamajax.training.log_hooks import LogHook
from llamajax.training.programs import compile_programs, program_digest
from llamajax.training.safety.guard_stops import GuardStop

PLANNED = {"train__steps": 4, "backend__compiler_options": "xla_backend_optimization_level=0"}


def kinds(workdir):
    return [event["event"] for event in load_events(workdir)]


@pytest.fixture(scope="module")
def finished(short_run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    options = PLANNED | {"checkpoint__asynchronous": False}
    gc.disable()  # as train.py does
    try:
        assert short_run(workdir, **options, stop_after=3) == 143
        assert gc.isenabled()  # again after the first step
    finally:
        gc.enable()
    assert short_run(workdir, **options) == 0
    return workdir


def test_a_stop_in_an_evaluation_leaves_it_and_the_export_to_the_next_start(short_run, tmp_path):
    options = {"train__steps": 3, "train__eval_every": 2, "checkpoint__export_hf_every": 2}
    assert short_run(tmp_path, **options, stop_after=2) == 143
    assert short_run(tmp_path, **options, stop_after=0) == 143
    second = kinds(tmp_path)[kinds(tmp_path).index("end") + 1 :]
    assert second == ["start", "restore", "compile", "evaluation", "signal", "end"]
    assert not (tmp_path / "hf").exists()
    assert short_run(tmp_path, **options) == 0
    evaluated = [row for row in read_rows(tmp_path / "metrics.jsonl") if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [2, 3]
    for row in evaluated:
        card = (tmp_path / "hf" / str(row["step"]) / "README.md").read_text("utf-8")
        assert f"| held-out loss | {row['eval_loss']:.4f} at step {row['step']} |" in card


def test_a_run_that_is_stopped_and_continued(finished):
    assert kinds(finished) == [
        "start", "restore", "compile", "save", "signal", "save", "end",
        "start", "restore", "compile", "save", "evaluation", "end",
    ]  # fmt: skip
    events = load_events(finished)
    assert [e["step"] for e in events if e["event"] == "save"] == [2, 3, 4]
    first, second = (event for event in events if event["event"] == "start")
    assert first["changed"] is None
    assert second["changed"] == {}
    # Stopped by the test at step 3 of log_every 1: no step is outside the rows, no signal came.
    (asked,) = [event for event in events if event["event"] == "signal"]
    assert (asked["signal"], "kept_steps_s" in asked) == (None, False)
    assert {"host", "pid", "command", "versions", "git", "num_devices"} <= set(first)
    assert [e["status"] for e in events if e["event"] == "end"] == ["stopped", "finished"]
    facts = json.loads((finished / "run.json").read_text())
    assert (facts["attention"], facts["attention_reason"]) == ("blocked", "the first choice on cpu")
    assert (facts["status"], facts["starts"]) == ("finished", 2)
    assert facts["time_breakdown"]["compile_s"] > 0
    lines = (finished / "train.log").read_text().splitlines()
    assert any("compiled in" in line for line in lines)
    assert any(line.endswith("report.html") and "finished" in line for line in lines)


def test_a_finished_run_that_is_run_again_changes_nothing(finished, short_run, monkeypatch):
    before = snapshot(finished)
    monkeypatch.setattr(run, "_train", None)  # neither restores nor compiles
    assert short_run(finished, **PLANNED) == 0
    assert snapshot(finished) == before


def test_a_killed_run_is_dead_and_the_next_start_says_so(finished, short_run, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "killed")
    for name, last in ((EVENTS, -3), ("metrics.jsonl", -2)):
        lines = (workdir / name).read_text().splitlines(keepends=True)
        (workdir / name).write_text("".join(lines[:last]) + lines[last][:20])
    shutil.rmtree(workdir / "checkpoints" / "4")
    write_report(workdir)
    assert json.loads((workdir / "run.json").read_text())["status"] == "dead"
    assert short_run(workdir, **PLANNED) == 0
    events = load_events(workdir)
    dead = [event for event in events if event["event"] == "found_dead"]
    assert [event["step"] for event in dead] == [3]
    assert dead[0]["last_seen_s"] <= dead[0]["time_s"]
    assert read_run_facts(workdir)["status"] == "finished"
    ours, theirs = (read_rows(path / "metrics.jsonl") for path in (workdir, finished))
    assert [row.get("loss") for row in ours] == [row.get("loss") for row in theirs]


def test_the_last_steps_of_a_dead_process_are_counted(tmp_path):
    """Steps 12 and 13 are in no row; a rollback from step 15 before them is in the black box."""
    sums = [(14, 9.0), (15, 9.5), (11, 0.5), (12, 1.0), (13, 1.75)]
    parts = (("steps_s", 1), ("data_wait_s", 0.25), ("tokens", 100))
    box = [{"step": n} | {f"unlogged_{name}": k * s for name, k in parts} for n, s in sums]
    write_rows(tmp_path / "blackbox" / "recent.jsonl", *box)
    start = {"event": "start", "step": 10, "time_s": 1.0, "host": "a", "pid": 3}
    rows = [{"step": 11, "step_time_s": 0.5, "time_s": 2.0}]
    history = History(tmp_path, [start], rows)
    found = history.found_dead(12)
    assert {k: v for k, v in found.items() if k != "last_seen_s"} == {
        "step": 13, "host": "a", "pid": 3, "kept_steps_s": 1.0, "kept_data_wait_s": 0.25,
        "kept_tokens": 100.0, "removed_steps_s": 0.75, "removed_data_wait_s": 0.1875,
    }  # fmt: skip
    assert history.found_dead(10)["removed_steps_s"] == 1.75
    ended = History(tmp_path, [start, {"event": "end", "step": 13, "time_s": 2.0}], rows)
    assert ended.found_dead(12) is None


@pytest.mark.parametrize("is_guard", [False, True])
def test_the_last_steps_before_an_error_are_counted(short_run, tmp_path, monkeypatch, is_guard):
    """Of 5 steps in no row, those up to the checkpoint of step 4 are kept."""
    error = (GuardStop if is_guard else RuntimeError)("lost")
    call = LogHook.__call__

    def fail_at_six(log, step, metrics):
        call(log, step, metrics)
        if step == 6:
            raise error

    monkeypatch.setattr(LogHook, "__call__", fail_at_six)
    ends = contextlib.nullcontext() if is_guard else pytest.raises(RuntimeError, match="lost")
    with ends:
        short_run(tmp_path, train__steps=6, train__log_every=100, checkpoint__asynchronous=False)
    end = load_events(tmp_path)[-1]
    code = GuardStop.exit_code if is_guard else 1
    assert (end["event"], end["code"]) == ("end", code)
    assert end.get("error") == (None if is_guard else "RuntimeError: lost")
    report = (tmp_path / "report.html").read_text()
    assert (f"ended with exit code {code}" if is_guard else "RuntimeError: lost") in report
    assert end["kept_tokens"] == pytest.approx(4 * 8 * 48)
    assert end["kept_steps_s"] > 0
    assert end["removed_steps_s"] > 0


def test_a_workdir_that_vanishes_is_one_error(short_run, tmp_path, monkeypatch):
    workdir, write = tmp_path / "run", LogHook._write

    def remove_first(log, step, values):
        if step == 2:
            shutil.rmtree(workdir)
        write(log, step, values)

    monkeypatch.setattr(LogHook, "_write", remove_first)
    with refused("has gone while the run was using it"):
        short_run(workdir, train__steps=4)
    assert not workdir.exists()


def test_a_start_does_not_import_orbax_which_can_be_imported_afterwards():
    code = (
        "import sys, llamajax.training.run\n"
        "assert 'orbax.checkpoint' not in sys.modules\n"
        "import orbax.checkpoint, llamajax.checkpoint.orbax_writer\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_program_that_is_planned_is_the_program_that_runs(finished, short_config):
    """The same before XLA sees it, and with the same options; another learning rate is another."""
    facts = json.loads((finished / "run.json").read_text())

    def planned(**overrides):
        config = short_config(**PLANNED, **overrides)
        step = abstract_step(config, absent_devices("cpu:8", config.backend))
        return program_digest(lowered_step(step)), step.compiler_options.values

    options = {"xla_backend_optimization_level": 0}
    assert planned() == (facts["program"], facts["compiler_options"]) == (facts["program"], options)
    assert planned(optim__learning_rate=0.1)[0] != facts["program"]


# The session keeps compiled programs, and reads none for devices that are not here.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache:UserWarning")
@needs_cuda
def test_a_run_on_h200s_lowers_the_program_that_is_planned_for_them(short_config, monkeypatch):
    """By the run's own path, which finds the devices of the plan; nothing is compiled."""
    fused = {"model__head_size": 16, "train__dtype": "bfloat16", "train__attention": "auto"}
    config = short_config(**fused)
    target = absent_devices("h200:8", config.backend)
    monkeypatch.setattr(setup.backends, "start", lambda *_, **__: target.machine)
    monkeypatch.setattr(jax, "devices", lambda: list(target.devices))
    monkeypatch.setattr(CompilerOptions, "compile", lambda options, lowered: (options, lowered))
    found = setup.set_up(config)
    programs = compile_programs(found, found.spec.abstract())
    options, lowered = programs.update
    step = abstract_step(config, target)
    assert programs.digest == program_digest(lowered) == program_digest(lowered_step(step))
    assert options == step.compiler_options
    assert "rematerialization" in options.values["xla_disable_hlo_passes"]
    assert (found.attention, found.compute) == (step.attention, step.compute)
    assert "@__cudnn$fmhaSoftmaxBackward(" in lowered.as_text()


class LoaderTimer(StepTimer):
    """Time passes in the loader only: half a second a batch, after the running step is done."""

    now = 100.0

    def __init__(self, **kwargs):
        super().__init__(**kwargs, clock=lambda: LoaderTimer.now)

    def mark_done(self, step: int) -> None:
        super().mark_done(step)
        DONE[step].set()


DONE: dict[int, threading.Event] = collections.defaultdict(threading.Event)


def test_a_slow_loader_is_waiting_for_data(short_run, tmp_path, monkeypatch):
    batches = loop.train_batches

    def slow(*args, step):
        for number, batch in enumerate(batches(*args, step=step)):
            assert number == 0 or DONE[number].wait(60)
            LoaderTimer.now += 0.5
            yield batch

    monkeypatch.setattr(attempt, "StepTimer", LoaderTimer)
    monkeypatch.setattr(loop, "train_batches", slow)
    assert short_run(tmp_path, train__steps=4) == 0
    rows = read_rows(tmp_path / "metrics.jsonl")
    times = [(row["data_wait_s"], row["step_time_s"]) for row in rows if "loss" in row]
    assert times == [(0.5, 0.0)] * 4
    breakdown = json.loads((tmp_path / "run.json").read_text())["time_breakdown"]
    assert breakdown["data_wait_s"] == pytest.approx(2.0)
    shown = json.dumps({"data_wait_s": breakdown["data_wait_s"]}, separators=(",", ":")).strip("{}")
    assert shown in (tmp_path / "report.html").read_text()
