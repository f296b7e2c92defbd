"""Two processes that train under launch: a worker is killed, and nothing shows it but the logs."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llamajax.supervision.comparison import largest_difference, values
from llamajax.supervision.trial import last_step, newest_checkpoint, read_meta

CONFIG = Path(__file__).parents[1] / "training" / "tiny_run.py"
SHORT = {
    "model.num_layers": 1,
    "train.steps": 10,
    "train.eval_every": 5,
    "train.eval_batches": 1,
    "checkpoint.every_steps": 2,
    "backend.name": "cpu",
    "mesh.fsdp": 2,
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bytes of a small corpus."""
    folder = tmp_path_factory.mktemp("launch")
    text = "".join(json.dumps({"text": f"line {i} of a small corpus."}) + "\n" for i in range(400))
    (folder / "corpus.jsonl").write_text(text)
    prepare = [f"--input={folder / 'corpus.jsonl'}", "--tokenizer=byte", "--workers=1"]
    prepare += [f"--output={folder / 'data'}", "--validation_fraction=0.05"]
    subprocess.run([sys.executable, "-m", "llamajax.prepare", *prepare], check=True)
    return folder / "data"


@pytest.fixture(scope="module")
def environment(data):
    """Compiled programs are kept from one start to the next: a restart takes seconds."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(data.parent / "compiled")}
    return dict(os.environ) | cache | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def train(data, workdir, devices: int) -> list[str]:
    keys = SHORT | {"backend.num_cpu_devices": devices}
    command = [sys.executable, "-m", "llamajax.train", f"--config={CONFIG}:{data}"]
    return [*command, f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in keys.items())]


def launch(data, workdir) -> list[str]:
    """Two processes with a device each."""
    command = [sys.executable, "-m", "llamajax.launch", "--processes_per_node=2", "--backoff_s=0"]
    return [*command, "--", *train(data, workdir, 1)]


@pytest.fixture(scope="module")
def undisturbed(data, environment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(launch(data, workdir), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert last_step(workdir) == 10
    return workdir


def interrupted(command, environment, workdir, *, rank: int | None, number: int):
    """Exit code and words of a launch that gets a signal after step 4, itself or one worker."""
    poll = threading.Event()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        first = process.stderr.readline()
        pids = [int(pid) for pid in re.search(r"pids ([\d, ]+)", first).group(1).split(",")]
        while newest_checkpoint(workdir) < 4 and process.poll() is None:
            poll.wait(0.005)
        os.kill(process.pid if rank is None else pids[rank], number)
        text = process.stderr.read()
    return process.returncode, text


def test_two_processes_are_one_process_with_two_devices(data, environment, undisturbed, tmp_path):
    done = subprocess.run(train(data, tmp_path, 2), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    difference = largest_difference(values(undisturbed), values(tmp_path))
    assert difference is None or difference.relative < 1e-6
    ledgers = [read_meta(run, 10)["ledger"]["digest"] for run in (undisturbed, tmp_path)]
    assert ledgers[0] == ledgers[1]


def test_a_killed_worker_costs_no_step(data, environment, undisturbed, tmp_path):
    code, text = interrupted(
        launch(data, tmp_path), environment, tmp_path, rank=1, number=signal.SIGKILL
    )
    assert code == 0, text
    assert "worker 1 was killed by SIGKILL" in text
    assert "continuing from step" in (tmp_path / "logs" / "worker_0.1.log").read_text()
    assert largest_difference(values(undisturbed), values(tmp_path)) is None


def test_sigterm_to_one_worker_stops_all_at_one_step(data, environment, undisturbed, tmp_path):
    command = launch(data, tmp_path)
    code, text = interrupted(command, environment, tmp_path, rank=1, number=signal.SIGTERM)
    assert code == 143, text
    stopped_at = last_step(tmp_path)
    assert (tmp_path / "checkpoints" / str(stopped_at)).is_dir()
    assert not (tmp_path / "logs" / "worker_0.1.log").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert largest_difference(values(undisturbed), values(tmp_path)) is None


def test_workdirs_that_are_not_shared_are_refused(data, environment, tmp_path):
    """Each worker has a directory of its own, as on nodes without shared storage."""
    command = launch(data, "WORKDIR")
    script = f'exec "$@" --workdir={tmp_path}/$LLAMAJAX_PROCESS_ID'
    place = command.index("--") + 1
    command[place:place] = ["sh", "-c", script, "sh"]
    command.insert(3, f"--log_dir={tmp_path / 'logs'}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "checkpoints need storage that all nodes share" in done.stderr
    assert "restart" not in done.stderr
