"""The parts of the proof: moments, comparison, the other mesh; and one whole proof, slow."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import warm

from llamajax.config import load
from llamajax.errors import UserError
from llamajax.monitoring.row_comparison import largest_difference, logged_values
from llamajax.proving import resume_proof, trial

CONFIG = Path(__file__).parents[1] / "training" / "tiny_run.py"


def write_rows(workdir: Path, *rows: dict) -> Path:
    workdir.mkdir(exist_ok=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir


def test_times_are_not_compared_and_all_else_is(tmp_path):
    rows = {"step": 1, "loss": 2.0, "step_time_s": 3.0, "tokens_per_s": 4.0, "mfu_full": None}
    a = logged_values(write_rows(tmp_path / "a", rows | {"anything": 1}))
    b = logged_values(write_rows(tmp_path / "b", rows | {"anything": 1, "step_time_s": 9.0}))
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
    assert largest_difference(
        {(1, "loss"): 1.0, (2, "loss"): 1.0}, {(1, "loss"): 1.0}
    ).relative == (math.inf)


def test_flags_of_the_proof_do_not_reach_train():
    argv = ["--config=a", "--kills", "3", "--config.train.steps", "5", "--seed=1", "--workdir", "d"]
    left = resume_proof.train_arguments(argv, ["kills", "seed", "workdir"])
    assert left == ("--config=a", "--config.train.steps", "5")


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
        (
            "row(1); row(2); save(2); done(2); row(3)",
            lambda workdir: trial.last_step(workdir) >= 3,
            3,
            2,
        ),
        (
            "save(2); done(2); row(4); save(4)",
            lambda workdir: trial.is_saving(workdir, 3),
            4,
            2,
        ),
        (
            "print('model x'); print('steps    9, from the beginning', flush=True)",
            lambda workdir: trial.has_chosen_start(workdir / "log"),
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
        return resume_proof.ProofOptions(
            train=(),
            config=load(f"{CONFIG}:somewhere", keys),
            workdir=tmp_path,
            steps=12,
            kills=3,
            seed=0,
            other=None,
        )

    return make


def test_a_short_run_is_a_valid_config(options_of):
    options = options_of(train__steps=9000, optim__schedule="wsd", optim__decay_steps=900)
    short = dict(
        text.removeprefix("--config.").split("=")
        for text in resume_proof.shortened(options.config, 12)
    )
    config = load(f"{CONFIG}:somewhere", {"optim.schedule": "wsd"} | short)
    assert (config.train.steps, config.checkpoint.every_steps, config.optim.decay_steps) == (
        (12, 2, 4)
    )


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
    with pytest.raises(UserError, match="holds precious"):
        resume_proof.prove(options_of())
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "precious").rmdir()
    with pytest.raises(UserError, match="a run ended with code 2"):  # the config names no data
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
        runs.append(write_rows(tmp_path / name, {"step": 12, "loss": loss}))
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
    text = "".join(json.dumps({"text": f"line {i} of a small corpus."}) + "\n" for i in range(400))
    (tmp_path / "corpus.jsonl").write_text(text)
    data = tmp_path / "data"
    prepare = [f"--input={tmp_path / 'corpus.jsonl'}", "--tokenizer=byte", f"--output={data}"]
    warm.run([sys.executable, "-m", "llamajax.prepare", *prepare], check=True)
    command = [sys.executable, "-m", "llamajax.verify_resume", f"--config={CONFIG}:{data}"]
    command += ["--config.model.num_layers=1", "--config.train.eval_every=0", "--kills=2"]
    command += ["--steps=6", "--processes=2", f"--workdir={tmp_path / 'proof'}"]
    done = warm.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: proven; 2 kills" in done.stdout
    assert "fsdp 2; 2 processes" in done.stdout
    assert {step for step, _ in logged_values(tmp_path / "proof" / "killed")} == set(range(1, 7))
