"""The parts of the proof: moments, comparison, the other mesh; and one whole proof, slow."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from refusal import refused
from shell import TINY_RUN, shell
from workdirs import prepare_texts, write_rows

from llamajax.config import load, stages_of
from llamajax.monitoring.row_comparison import largest_difference, logged_values
from llamajax.proving import resume_proof, trial

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def test_times_are_not_compared_and_all_else_is(tmp_path):
    rows = {"step": 1, "loss": 2.0, "step_time_s": 3.0, "tokens_per_s": 4.0, "mfu_full": None}
    for name, time_s in (("a", 3.0), ("b", 9.0)):
        row = rows | {"anything": 1, "step_time_s": time_s}
        write_rows(tmp_path / name / "metrics.jsonl", row)
    a, b = (logged_values(tmp_path / name) for name in "ab")
    assert a == {(1, "loss"): 2.0, (1, "anything"): 1}
    assert largest_difference(a, b) is None


@pytest.mark.parametrize(
    ("theirs", "ours", "relative"),
    [
        (2.0, math.nextafter(2.0, 3), 2.0**-52),
        (1.0, 1.1, 0.1 / 1.1),
        (math.nan, math.nan, None),
        (math.nan, 1.0, math.inf),
        (1.0, None, math.inf),
        (0.0, 0.0, None),
    ],
)
def test_the_largest_difference(theirs, ours, relative):
    one, other = {(1, "loss"): theirs, (2, "x"): 5.0}, {(1, "loss"): ours, (2, "x"): 5.0}
    found = largest_difference(one, other)
    assert found is None if relative is None else found.relative == pytest.approx(relative)
    assert relative is None or "loss of step 1" in found.what


def test_a_row_that_is_missing_differs_infinitely():
    one, other = {(1, "loss"): 1.0, (2, "loss"): 1.0}, {(1, "loss"): 1.0}
    assert largest_difference(one, other).relative == math.inf


def fake_train(workdir: Path, lines: str) -> list[str]:
    """A command that writes what `train` would: `row(n)`, `save(n)`, `done(n)`."""
    preamble = f"""
import json, signal, sys
from pathlib import Path
workdir = Path({str(workdir)!r})
def row(n):
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({{"step": n, "loss": 1.0}}) + "\\n")
def save(n):
    (workdir / "checkpoints" / f"{{n}}.orbax-checkpoint-tmp-7").mkdir(parents=True)
def done(n):
    (workdir / "checkpoints" / f"{{n}}.orbax-checkpoint-tmp-7").rename(
        workdir / "checkpoints" / str(n))
"""
    return [sys.executable, "-S", "-c", preamble + lines]


@pytest.mark.parametrize(
    ("lines", "condition", "step", "checkpoint"),
    [
        ("row(1); row(2); save(2); done(2); row(3)", lambda run: trial.last_step(run) >= 3, 3, 2),
        ("save(2); done(2); row(4); save(4)", lambda run: trial.is_saving(run, 3), 4, 2),
        (
            "print('model x'); print('steps    9, from the beginning', flush=True)",
            lambda run: trial.has_chosen_start(run / "log"),
            0,
            0,
        ),
    ],
    ids=["at a step", "in a save", "before the first step"],
)
def test_a_start_is_killed_when_the_condition_holds(tmp_path, lines, condition, step, checkpoint):
    result = trial.run_trial(
        fake_train(tmp_path, f"{lines}\nsignal.pause()"),
        workdir=tmp_path,
        log=tmp_path / "log",
        kill_when=lambda: condition(tmp_path),
    )
    assert result == trial.TrialResult(code=None, step=step, checkpoint=checkpoint)


def test_an_earlier_or_a_finished_save_does_not_count(tmp_path):
    for name in ("2.orbax-checkpoint-tmp-7", "3", "x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        assert not trial.is_saving(tmp_path, 3)
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp-7").mkdir()
    assert trial.is_saving(tmp_path, 3)


@pytest.mark.parametrize("kill_when", [None, lambda: False])
def test_a_start_that_ends_by_itself_gives_its_code(tmp_path, kill_when):
    command = fake_train(tmp_path, "row(1); sys.exit(5)")
    result = trial.run_trial(command, workdir=tmp_path, log=tmp_path / "log", kill_when=kill_when)
    assert result == trial.TrialResult(code=5, step=1, checkpoint=0)


@pytest.fixture
def options_of(tmp_path):
    def make(**overrides) -> resume_proof.ProofOptions:
        keys = {key.replace("__", "."): value for key, value in overrides.items()}
        config = load(f"{TINY_RUN}:somewhere", keys)
        numbers = {"steps": 12, "kills": 3, "seed": 0}
        return resume_proof.ProofOptions(config=config, workdir=tmp_path, **numbers)

    return make


def test_a_short_run_is_a_valid_config(options_of):
    long = {"optim.schedule": "wsd", "monitoring.profile_steps": "20:25"}
    long["data.stages"] = '[{"from_step": 2000, "seq_len": 24}, {"from_tokens": 2e6, "seq_len": 9}]'
    options = options_of(train__steps=9000, optim__decay_steps=900, **long)
    short = dict(
        text.removeprefix("--config.").split("=")
        for text in resume_proof.shortened(options.config, 12)
    )
    config = load(f"{TINY_RUN}:somewhere", long | short)
    found = (config.train.steps, config.checkpoint.every_steps, config.optim.decay_steps)
    assert found == (12, 2, 4)
    assert [stage.first_step for stage in stages_of(config)] == [0, 4, 8]


@pytest.mark.parametrize(
    ("facts", "mesh"),
    [
        ({"platform": "cpu", "num_devices": 1, "mesh": {}}, {"num_cpu_devices": 2, "fsdp": 2}),
        ({"platform": "cpu", "num_devices": 8, "mesh": {}}, {"num_cpu_devices": 4, "fsdp": 4}),
        ({"platform": "gpu", "num_devices": 8, "mesh": {"fsdp": 8}}, {"fsdp": 4, "tensor": 2}),
        ({"platform": "gpu", "num_devices": 8, "mesh": {"data": 8}}, {"fsdp": 8, "tensor": 1}),
        ({"platform": "gpu", "num_devices": 1, "mesh": {}}, None),
    ],
)
def test_the_other_mesh(options_of, tmp_path, facts, mesh):
    (tmp_path / "run.json").write_text(json.dumps(facts))
    found = resume_proof.other_mesh(options_of(), tmp_path)
    if mesh is None:
        assert found is None
    else:
        chosen = dict(text.rpartition(".")[2].split("=") for text in found)
        assert {key: int(chosen[key]) for key in mesh} == mesh


@pytest.mark.parametrize(("devices", "processes", "each"), [(1, 2, 1), (8, 4, 2), (2, 4, 1)])
def test_the_other_run_as_several_processes(options_of, tmp_path, devices, processes, each):
    facts = {"platform": "cpu", "num_devices": devices, "mesh": {}}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    options = dataclasses.replace(options_of(), processes=processes)
    found = resume_proof.other_mesh(options, tmp_path)
    assert f"--config.backend.num_cpu_devices={each}" in found
    assert f"--config.mesh.fsdp={each * processes}" in found


def test_only_an_earlier_proof_makes_room(options_of, tmp_path):
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed.1.log").touch()
    (tmp_path / "precious").mkdir()
    with refused("holds precious", unchanged=(tmp_path,)):
        resume_proof.prove(options_of())
    (tmp_path / "precious").rmdir()
    with refused("a run ended with code 2"):  # the config names no data
        resume_proof.prove(options_of())
    assert [path.name for path in tmp_path.iterdir()] == ["undisturbed.log"]


@pytest.mark.parametrize(
    ("killed", "moved", "ledger", "proven", "words"),
    [
        (2.0, 2.0, "aa", True, "verdict: proven; 3 kills cost no step on cpu"),
        (2.0, 2.0001, "aa", True, "relative difference 5.0e-05, allowed 0.0001 (loss of step 12"),
        (math.nextafter(2.0, 3), 2.0, "aa", False, "differs: loss of step 12"),
        (2.0, 2.001, "aa", False, "verdict: NOT proven"),
        (2.0, 2.0, "ab", False, "samples      differ (ledger aa, ab)"),
    ],
)
def test_the_verdict(options_of, tmp_path, capsys, killed, moved, ledger, proven, words):
    runs = []
    for name, loss, digest in (("u", 2.0, "aa"), ("k", killed, "aa"), ("m", moved, ledger)):
        runs.append(tmp_path / name)
        write_rows(runs[-1] / "metrics.jsonl", {"step": 12, "loss": loss})
        facts = {"platform": "cpu", "mesh": {"fsdp": 2}, "num_processes": 2}
        (runs[-1] / "run.json").write_text(json.dumps(facts))
        meta = runs[-1] / "checkpoints" / "12" / "meta.json"
        meta.parent.mkdir(parents=True)
        meta.write_text(json.dumps({"ledger": {"digest": digest}}))
    assert resume_proof.judge(options_of(), *runs) is proven
    printed = capsys.readouterr().out
    assert words in printed
    assert "other mesh   fsdp 2; 2 processes" in printed


@pytest.mark.slow
def test_a_whole_proof_holds(tmp_path):
    data = prepare_texts(tmp_path, (f"line {i} of a small corpus." for i in range(400)))
    flags = [f"--config={TINY_RUN}:{data}", f"--workdir={tmp_path / 'proof'}", "--steps=6"]
    flags += ["--config.model.num_layers=1", "--config.train.eval_every=0"]
    done = shell("verify_resume", *flags, "--kills=2", "--processes=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: proven; 2 kills" in done.stdout
    assert "fsdp 2; 2 processes" in done.stdout
    assert {step for step, _ in logged_values(tmp_path / "proof" / "killed")} == set(range(1, 7))


@pytest.mark.slow
def test_a_run_that_is_hurt_twice_logs_what_an_undisturbed_one_does(tmp_path):
    """The soak of `benchmarks/`, a short one."""
    command = [sys.executable, str(SOAK), "--faults=2", f"--workdir={tmp_path / 'soak'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 faults, exit code 0" in done.stdout
