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
from real_runs import interrupted, launch, train

from llamajax.monitoring.row_comparison import largest_difference, logged_values
from llamajax.proving.trial import last_step, read_meta


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bytes of a small corpus."""
    folder = tmp_path_factory.mktemp("launch")
    text = "".join(json.dumps({"text": f"line {i} of a small corpus."}) + "\n" for i in range(400))
    (folder / "corpus.jsonl").write_text(text)
    prepare = [f"--input={folder / 'corpus.jsonl'}", "--tokenizer=byte", "--workers=1"]
    prepare += [f"--output={folder / 'data'}", "--validation_fraction=0.05"]
    warm.run([sys.executable, "-m", "llamajax.prepare", *prepare], check=True)
    return folder / "data"


@pytest.fixture(scope="module")
def environment():
    return dict(os.environ)


@pytest.fixture(scope="module")
def undisturbed(data, environment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = warm.run(launch(data, workdir), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert last_step(workdir) == 10
    return workdir


def test_two_processes_are_one_process_with_two_devices(data, environment, undisturbed, tmp_path):
    done = warm.run(train(data, tmp_path, 2), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    difference = largest_difference(logged_values(undisturbed), logged_values(tmp_path))
    assert difference is None or difference.relative < 1e-6
    ledgers = [read_meta(run, 10)["ledger"]["digest"] for run in (undisturbed, tmp_path)]
    assert ledgers[0] == ledgers[1]


def test_a_killed_worker_costs_no_step(data, environment, undisturbed, tmp_path):
    code, text = interrupted(
        launch(data, tmp_path), environment, tmp_path, rank=1, number=signal.SIGKILL
    )
    assert code == 0, text
    assert "worker 1 was killed by SIGKILL" in text
    assert "was reached: this failure does not count" in text
    assert "continuing from step" in (tmp_path / "logs" / "worker_0.1.log").read_text()
    assert largest_difference(logged_values(undisturbed), logged_values(tmp_path)) is None


@pytest.mark.slow
def test_a_schedulers_signal_to_one_worker_stops_all_at_one_step(
    data, environment, undisturbed, tmp_path
):
    command = launch(data, tmp_path)
    code, text = interrupted(command, environment, tmp_path, rank=1, number=signal.SIGUSR2)
    assert code == 143, text
    stopped_at = last_step(tmp_path)
    assert (tmp_path / "checkpoints" / str(stopped_at)).is_dir()
    assert not (tmp_path / "logs" / "worker_0.1.log").exists()
    done = warm.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert largest_difference(logged_values(undisturbed), logged_values(tmp_path)) is None


@pytest.mark.slow
@pytest.mark.parametrize("key", ["--workdir", "--config.checkpoint.directory"])
def test_directories_that_are_not_shared_are_refused(data, environment, tmp_path, key):
    """One path is a directory of its own for each worker, as on nodes without shared storage."""
    command = launch(data, tmp_path / "run")
    own = f"{tmp_path}/$LLAMAJAX_PROCESS_ID"
    script = f'mkdir {own} && cd {own} && exec "$@" {key}=here'
    place = command.index("--") + 1
    command[place:place] = ["sh", "-c", script, "sh"]
    command.insert(3, f"--log_dir={tmp_path / 'logs'}")
    done = warm.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert re.search(rf"{key.removeprefix('--config.')}=\S*here on ", done.stderr), done.stderr
    assert "checkpoints need storage that all nodes share" in done.stderr
    assert "restart" not in done.stderr


# Without a decay, so that a run may be continued by raising train.steps.
KEYS = {"optim.schedule": "constant", "optim.warmup_steps": 1, "train.eval_every": 2}


def four(data, workdir, *, steps: int, devices: int, fsdp: int = 4) -> list[str]:
    keys = KEYS | {"train.steps": steps, "mesh.fsdp": fsdp}
    return [*train(data, workdir, devices), *(f"--config.{k}={v}" for k, v in keys.items())]


def finished(commands: list[list[str]], environments: list[dict]) -> None:
    started = [
        warm.Popen(c, env=e, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for c, e in zip(commands, environments, strict=True)
    ]
    texts = [process.communicate(timeout=300)[0] for process in started]
    assert {process.returncode for process in started} == {0}, "\n".join(texts)


def same(workdir, other, *, step: int) -> None:
    """Losses within the tolerance of float32, and the same samples."""
    difference = largest_difference(logged_values(workdir), logged_values(other))
    assert difference is None or difference.relative < 1e-5, difference
    digests = {read_meta(run, step)["ledger"]["digest"] for run in (workdir, other)}
    assert len(digests) == 1


@pytest.fixture(scope="module")
def alone(data, environment, tmp_path_factory):
    """One process with four devices, six steps."""
    workdir = tmp_path_factory.mktemp("alone")
    finished([four(data, workdir, steps=6, devices=4)], [environment])
    return workdir


def started_by_hand(command: list[str], environment: dict, port: int):
    place = {"coordinator_address": f"127.0.0.1:{port}", "num_processes": 4}
    flags = [f"--config.backend.{key}={value}" for key, value in place.items()]
    ranks = range(4)
    return [[*command, *flags, f"--config.backend.process_id={r}"] for r in ranks], [
        environment
    ] * 4


def started_by_slurm(command: list[str], environment: dict, port: int):
    """The variables of `srun`; the port follows from the number of the job."""
    job = {"SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NUM_TASKS": "4"}
    job["SLURM_STEP_NODELIST"] = "localhost"
    return [command] * 4, [environment | job | {"SLURM_PROCID": str(r)} for r in range(4)]


@pytest.fixture
def port() -> int:
    """A free port among those that jobs of SLURM take."""
    for number in range(61440 + os.getpid() % 4000, 65536):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", number)):
                return number
    raise AssertionError("no port is free")


@pytest.mark.slow
@pytest.mark.parametrize("start", [started_by_hand, started_by_slurm])
def test_four_ranks_without_a_launcher(data, environment, alone, tmp_path, port, start):
    command = four(data, tmp_path, steps=6, devices=1)
    finished(*start(command, environment, port))
    same(tmp_path, alone, step=6)


def launched(command: list[str], processes: int) -> list[str]:
    start = launch("", "")[:3]  # python -m llamajax.launch
    return [*start, f"--processes_per_node={processes}", "--max_restarts=0", "--", *command]


@pytest.mark.slow
def test_launched_and_resumed_on_one_two_and_four_processes(
    data,
    environment,
    alone,
    tmp_path,
):
    for steps, processes in ((2, 1), (4, 2), (6, 4)):
        command = four(data, tmp_path, steps=steps, devices=1, fsdp=processes)
        finished([launched(command, processes)], [environment])
    same(tmp_path, alone, step=6)


@pytest.mark.slow
def test_resumed_on_eight_four_and_eight_devices(data, environment, alone, tmp_path):
    for steps, devices in ((2, 8), (4, 4), (6, 8)):
        command = four(data, tmp_path, steps=steps, devices=devices, fsdp=devices)
        finished([command], [environment])
    same(tmp_path, alone, step=6)
