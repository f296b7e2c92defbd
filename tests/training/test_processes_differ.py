"""Two processes that were started with different configs, data or tokenizers end with code 2."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import warm

from llamajax.prepare import main as prepare

CONFIG = Path(__file__).with_name("tiny_run.py")
SMALL = {
    "mesh.fsdp": 2,
    "model.num_layers": 1,
    "train.steps": 1,
    "optim.warmup_steps": 1,
    "train.eval_every": 0,
    "train.eval_batches": 1,
    "monitoring.progress": "none",
    "backend.num_cpu_devices": 1,
}
# Of 4,096 ports, JAX takes the one that the number of Open MPI's job falls on.
_OPEN_MPI_PORTS = 65536 - 4096


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@functools.cache
def open_mpi_job() -> int:
    """The number of a job whose port is free."""
    for job in range(1, 4096):
        try:
            with socket.create_server(("127.0.0.1", _OPEN_MPI_PORTS + job)):
                return job
        except OSError:
            continue
    raise RuntimeError("no port is free")


def open_mpi(rank: int) -> dict[str, str]:
    """The variables by which JAX detects Open MPI."""
    return {
        "OMPI_MCA_orte_hnp_uri": f"{open_mpi_job() * 4096}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
    }


@pytest.fixture(scope="module")
def other_data(short_data, tmp_path_factory) -> Path:
    """Another text, prepared with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "text.txt").write_text("Quite another text. " * 300)
    arguments = [f"--input={folder / 'text.txt'}", "--tokenizer=byte", "--workers=1"]
    prepare([*arguments, f"--output={folder / 'data'}", "--validation_fraction=0.05"])
    return folder / "data"


@pytest.fixture(scope="module")
def outcomes(short_data, other_data, tmp_path_factory):
    """Exit codes and output of both processes of each pair, by the name of the pair."""
    folder = tmp_path_factory.mktemp("pairs")
    same, other, empty = (folder / name for name in ("same", "other", "empty"))
    for host, target in ((same, short_data), (other, other_data), (empty, None)):
        host.mkdir()  # a process's current folder: `data` means another one on each host
        if target is not None:
            (host / "data").symlink_to(target)
    pairs = {
        "rate": ({"optim.learning_rate": 0.002}, same),
        "seed": ({"optim.learning_rate": 0.002, "data.seed": 7}, same),
        "model": ({"model.num_layers": 2}, same),
        "directory": ({"checkpoint.directory": folder / "elsewhere"}, same),
        "path": ({"data.path": other_data}, same),
        "contents": ({}, other),
        "gone": ({}, empty),
        "detected": ({"optim.learning_rate": 0.002}, same),
        "refused": ({}, same),
        "exempt": ({"data.num_threads": 1, "monitoring.progress": "lines"}, same),
    }
    started = {}
    for name, (own_keys, host) in pairs.items():
        port = free_port()
        for rank in (0, 1):
            place = {"num_processes": 2, "process_id": rank}
            place["coordinator_address"] = f"127.0.0.1:{port}"
            keys = SMALL | {f"backend.{key}": value for key, value in place.items()}
            keys |= own_keys if rank else {}
            if name == "refused":  # by both, once the workdir is open
                keys |= {"train.init_from": str(empty / "nothing")}
            if name == "detected":
                keys = {key: value for key, value in keys.items() if key[8:] not in place}
            flags = [f"--config={CONFIG}:data", f"--workdir={folder / name}"]
            flags += [f"--config.{key}={value}" for key, value in keys.items()]
            started[name, rank] = warm.Popen(
                [sys.executable, "-m", "llamajax.train", *flags],
                cwd=host if rank else same,
                env=os.environ | (open_mpi(rank) if name == "detected" else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
    found: dict[str, list[tuple[int, str]]] = {name: [] for name in pairs}
    for (name, _), process in started.items():
        text, _ = process.communicate(timeout=500)
        found[name].append((process.returncode, text))
    return found, folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rate", ("in optim.learning_rate: 0.003 in process 0 on", "; 0.002 in process 1 on")),
        ("seed", ("in data.seed: 1 in process 0 on", "; 7 in process 1 on")),
        ("seed", ("They also differ in optim.learning_rate. Start",)),
        ("model", ("in model.num_layers: 1 in process 0", "2 in process 1")),
        ("directory", ("in checkpoint.directory: none in process 0", "elsewhere in process 1")),
        ("path", ("in data.path: data in process 0", "other0/data in process 1")),
        ("contents", ("in the train data in data.path: ", " tokens, weight 1, fingerprint ")),
        ("gone", ("process 1 on", "data.path: data: no such directory")),
        ("refused", ("train.init_from = ", "there is no such file or directory")),
        ("detected", ("in optim.learning_rate: 0.003 in process 0 on", "; 0.002 in process 1 on")),
    ],
)
def test_processes_that_differ_end_with_code_2(outcomes, name, words):
    found, folder = outcomes
    for code, text in found[name]:
        assert code == 2, text
        assert all(word in text for word in words), text
        assert "Traceback" not in text
    assert not (folder / name).exists()


def test_keys_of_one_process_alone_may_differ(outcomes):
    found, folder = outcomes
    for code, text in found["exempt"]:
        assert code == 0, text
    assert '"step": 1' in (folder / "exempt" / "metrics.jsonl").read_text()
