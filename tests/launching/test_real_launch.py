"""Two and four processes that train: a worker is killed, and nothing shows it but the logs."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import warm
from real_runs import finish, interrupt, launch, train
from workdirs import export_poisoned, prepare_texts

from llamajax.monitoring.row_comparison import largest_difference, logged_values
from llamajax.proving.trial import last_step, newest_checkpoint, read_meta


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    texts = [f"line {i} of a small corpus." for i in range(400)]
    return prepare_texts(tmp_path_factory.mktemp("launch"), texts)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(launch(train(data, workdir, 1)))
    assert last_step(workdir) == 10
    return workdir


def check_same(workdir, other, *, step: int, tolerance: float) -> None:
    """Losses within the tolerance, and the same samples."""
    difference = largest_difference(logged_values(workdir), logged_values(other))
    assert difference is None or difference.relative < tolerance, difference
    digests = {read_meta(run, step)["ledger"]["digest"] for run in (workdir, other)}
    assert len(digests) == 1


def test_two_processes_are_one_process_with_two_devices(data, undisturbed, tmp_path):
    finish(train(data, tmp_path, 2))
    check_same(undisturbed, tmp_path, step=10, tolerance=1e-6)


def interrupted(data, workdir, number: int) -> tuple[int, str]:
    """A signal to worker 1 after step 4."""
    command = launch(train(data, workdir, 1))
    return interrupt(command, number, rank=1, when=lambda: newest_checkpoint(workdir) >= 4)


def test_a_killed_worker_costs_no_step(data, undisturbed, tmp_path):
    code, text = interrupted(data, tmp_path, signal.SIGKILL)
    assert code == 0, text
    assert "worker 1 was killed by SIGKILL" in text
    assert "was reached: this failure does not count" in text
    assert "continuing from step" in (tmp_path / "logs" / "worker_0.1.log").read_text()
    assert largest_difference(logged_values(undisturbed), logged_values(tmp_path)) is None


@pytest.mark.slow
def test_a_schedulers_signal_to_one_worker_stops_all_at_one_step(data, undisturbed, tmp_path):
    code, text = interrupted(data, tmp_path, signal.SIGUSR2)
    assert code == 143, text
    assert (tmp_path / "checkpoints" / str(last_step(tmp_path))).is_dir()
    assert not (tmp_path / "logs" / "worker_0.1.log").exists()
    finish(launch(train(data, tmp_path, 1)))
    assert largest_difference(logged_values(undisturbed), logged_values(tmp_path)) is None


@pytest.mark.slow
@pytest.mark.parametrize("key", ["--workdir", "--config.checkpoint.directory"])
def test_directories_that_are_not_shared_are_refused(data, tmp_path, key):
    """One path is a directory of its own for each worker, as on nodes without shared storage."""
    own = f"{tmp_path}/$LLAMAJAX_PROCESS_ID"
    script = f'mkdir {own} && cd {own} && exec "$@" {key}=here'
    command = ["sh", "-c", script, "sh", *train(data, tmp_path / "run", 1)]
    done = warm.run(
        launch(command, f"--log_dir={tmp_path / 'logs'}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert re.search(rf"{key.removeprefix('--config.')}=\S*here on ", done.stderr), done.stderr
    assert "checkpoints need storage that all nodes share" in done.stderr
    assert "restart" not in done.stderr


def of_steps(data, workdir, *, steps: int, devices: int, fsdp: int = 4) -> list[str]:
    """Without a decay, so that a run may be continued by raising train.steps."""
    constant = {"optim__schedule": "constant", "optim__warmup_steps": 1, "train__eval_every": 2}
    return train(data, workdir, devices, train__steps=steps, mesh__fsdp=fsdp, **constant)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """One process with four devices, six steps."""
    workdir = tmp_path_factory.mktemp("alone")
    finish(of_steps(data, workdir, steps=6, devices=4))
    return workdir


@pytest.fixture
def port() -> int:
    """A free port among those that jobs of SLURM take."""
    for number in range(61440 + os.getpid() % 4000, 65536):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", number)):
                return number
    raise AssertionError("no port is free")


@pytest.mark.slow
def test_four_ranks_started_by_hand(data, alone, tmp_path, port):
    command = of_steps(data, tmp_path, steps=6, devices=1)
    command += [f"--config.backend.coordinator_address=127.0.0.1:{port}"]
    command += ["--config.backend.num_processes=4"]
    finish(*([*command, f"--config.backend.process_id={rank}"] for rank in range(4)))
    check_same(tmp_path, alone, step=6, tolerance=1e-5)


@pytest.mark.slow
def test_four_ranks_started_by_slurm(data, alone, tmp_path, port):
    """The variables of `srun`; the port follows from the number of the job."""
    finish(
        *[of_steps(data, tmp_path, steps=6, devices=1)] * 4,
        SLURM_JOB_ID=str(port - 61440),
        SLURM_STEP_NUM_TASKS="4",
        SLURM_STEP_NODELIST="localhost",
        SLURM_PROCID="{rank}",
    )
    check_same(tmp_path, alone, step=6, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("launched", "counts"), [(True, (1, 2, 4)), (False, (8, 4, 8))])
def test_resumed_on_other_numbers_of_processes_or_devices(data, alone, tmp_path, launched, counts):
    for steps, count in zip((2, 4, 6), counts, strict=True):
        devices = 1 if launched else count
        command = of_steps(data, tmp_path, steps=steps, devices=devices, fsdp=count)
        finish(launch(command, "--max_restarts=0", processes=count) if launched else command)
    check_same(tmp_path, alone, step=6, tolerance=1e-5)


# The weights of one rare byte are NaN: each batch with that byte in it has a loss of NaN.
RARE = "Z"
GUARDED = {
    "train__eval_every": 0,
    "checkpoint__every_steps": 1,
    "checkpoint__keep": 99,
    "guard__max_in_a_row": 1,
    "guard__max_rollbacks": 99,
}
# A run does not begin from weights that are not finite, but for this.
TRAIN_UNCHECKED = """
from llamajax import train
from llamajax.formats.huggingface import hf_read
hf_read.check_finite = lambda *_: None
train.run_verb(train.main)
"""


def rollbacks(workdir) -> list[dict]:
    rows = (row for row in (workdir / "audit.jsonl").read_text().split("\n") if row)
    return [{**json.loads(row), "time": None} for row in rows]


@pytest.mark.slow
def test_a_rollback_of_two_is_that_of_one_and_outlives_a_kill(tmp_path):
    texts = [f"line {i} {'of a small corpus ' * (i % 5)}{RARE * (i % 43 == 7)}" for i in range(400)]
    data, one, two = prepare_texts(tmp_path, texts, held_out=0), tmp_path / "one", tmp_path / "two"
    finish(train(data, tmp_path / "first", 2, **GUARDED))  # its program serves the next run, too
    weights = export_poisoned(tmp_path / "first", tmp_path / "hf", ord(RARE))

    def guarded(workdir, devices: int) -> list[str]:
        command = train(data, workdir, devices, train__init_from=weights, **GUARDED)
        return [sys.executable, "-c", TRAIN_UNCHECKED, *command[3:]]  # without -m llamajax.train

    finish(guarded(one, 2))
    assert last_step(one) == 10
    assert len(rollbacks(one)) >= 2
    # as soon as the first rollback is noted
    command, audit = launch(guarded(two, 1)), two / "audit.jsonl"
    code, text = interrupt(command, signal.SIGKILL, rank=1, when=audit.exists)
    assert code == 0, text
    assert "worker 1 was killed by SIGKILL" in text
    assert rollbacks(two) == rollbacks(one)
    difference = largest_difference(logged_values(one), logged_values(two))
    assert difference is None or difference.relative < 1e-6
