"""Two processes on one machine: they end alike where they differ, and one of them exports."""

import functools
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from shell import SHORT, free_port, started, train_command
from workdirs import prepare_texts, read_rows

SMALL = SHORT | {
    "mesh.fsdp": 2,
    "train.steps": 1,
    "optim.warmup_steps": 1,
    "backend.num_cpu_devices": 1,
}
# `train` in a process that may not write a byte of an export.
_FORBIDDEN = """
import sys
from llamajax import train
from llamajax.formats.huggingface import hf_write
from llamajax.formats import peft
def refuse(*_args, **_options):
    raise RuntimeError("this process writes an export")
for module in (hf_write, peft):
    module.replaced_directory = module.write_json = module.write_safetensors = refuse
sys.exit(train.main(sys.argv[1:]))
"""
# Of 4,096 ports, JAX takes the one that the number of Open MPI's job falls on.
_OPEN_MPI_PORTS = 65536 - 4096


def joined(rank: int, port: int) -> dict[str, object]:
    """The keys that make a run one of two processes."""
    place = {"num_processes": 2, "process_id": rank, "coordinator_address": f"127.0.0.1:{port}"}
    return {f"backend.{key}": value for key, value in place.items()}


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
    return prepare_texts(tmp_path_factory.mktemp("other"), ["Quite another text. " * 10] * 30)


@pytest.fixture(scope="module")
def outcomes(short_data, other_data, tmp_path_factory):
    """Exit codes and output of both processes of each pair, by the name of the pair."""
    folder = tmp_path_factory.mktemp("pairs")
    same, other, empty = (folder / name for name in ("same", "other", "empty"))
    for host, target in ((same, short_data), (other, other_data), (empty, None)):
        host.mkdir()  # a process's current folder: `data` means another one on each host
        if target is not None:
            (host / "data").symlink_to(target)
    shutil.copy(Path(__file__).with_name("own_chain.py"), same)
    row = {"question": "A line", "choices": [f"of {n} words" for n in range(9)], "answer": 3}
    (same / "order.jsonl").write_text((json.dumps(row) + "\n") * 30)
    pairs = {
        "seed": ({"optim.learning_rate": 0.002, "data.seed": 7}, same),
        "contents": ({}, other),
        "gone": ({}, empty),
        "detected": ({"optim.learning_rate": 0.002}, same),
        "refused": ({}, same),
        "chain": ({}, same),
        "exempt": ({"data.num_threads": 1, "monitoring.progress": "lines"}, same),
    }
    processes = {}
    for name, (own_keys, host) in pairs.items():
        port = free_port()
        for rank in (0, 1):
            keys = SMALL | ({} if name == "detected" else joined(rank, port))
            keys |= own_keys if rank else {}
            if name == "exempt":
                keys |= {"data.validation": f"other:{other_data}", "train.sample_prompts": "a"}
                keys |= {"train.tasks": "order.jsonl"}
            if name == "chain":  # process 1 alone fails in it
                keys |= {"optim.chain": "own_chain:fails"}
            if name == "refused":  # by both, once the workdir is open
                keys |= {"train.init_from": str(empty / "nothing")}
            processes[name, rank] = started(
                train_command("data", folder / name, keys),
                cwd=host if rank else same,
                env=os.environ
                | ({"OWN_CHAIN": "rate" if rank else "1"} if name == "chain" else {})
                | (open_mpi(rank) if name == "detected" else {})
                | (
                    {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}
                    if (name, rank) == ("seed", 1)
                    else {}
                ),
            )
    found: dict[str, list[tuple[int, str]]] = {name: [] for name in pairs}
    for (name, _), process in processes.items():
        text, _ = process.communicate(timeout=500)
        found[name].append((process.returncode, text))
    return found, folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("seed", ("in data.seed: 1 in process 0 on", "; 7 in process 1 on")),
        ("seed", ("differ in optim.learning_rate, XLA_FLAGS and LIBTPU_INIT_ARGS. Start",)),
        ("contents", ("in the train data in data.path: ", " tokens, weight 1, fingerprint ")),
        ("gone", ("process 1 on", "data.path: data: no such directory")),
        ("refused", ("train.init_from = ", "there is no such file or directory")),
        ("chain", ("optim.chain = own_chain:fails", "line 9: KeyError: rate")),
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
    (evaluated,) = [row for row in read_rows(folder / "exempt/metrics.jsonl") if "eval_loss" in row]
    assert evaluated["eval_loss"] != evaluated["eval_loss/other"]
    assert evaluated["task/order/accuracy"] in (0, 1), "all questions are the same"
    assert 1 < evaluated["task/order/bits_per_byte"] < 20
    assert [row["step"] for row in read_rows(folder / "exempt" / "samples.jsonl")] == [1]


@pytest.mark.slow
def test_both_end_and_the_first_writes_the_exports(base, short_data, loaded, tmp_path, monkeypatch):
    """They train adapters on imported weights."""
    workdir = tmp_path / "run"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    port, processes = free_port(), []
    adapters = {"train.init_from": base, "lora.rank": 3, "lora.alpha": 6}
    for rank in (1, 0):
        keys = SHORT | joined(rank, port) | adapters
        keys |= {"mesh.data": 2, "mesh.fsdp": 2, "backend.num_cpu_devices": 2, "train.steps": 4}
        keys |= {"optim.learning_rate": 0.02, "checkpoint.export_hf_every": 2}
        command = train_command(short_data, workdir, keys)
        if rank == 1:
            command[1:3] = ["-c", _FORBIDDEN]
        processes.append(started(command))
    texts = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)
    (warned,) = [line for line in "".join(texts).splitlines() if "warning" in line]
    assert "its base, which PEFT cannot load" in warned
    assert {path.name for path in (workdir / "hf").iterdir()} == {"2", "4"}
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in (workdir / "peft").iterdir()} == adapter
    merged, before = loaded(workdir), loaded(base)
    for name, value in loaded(workdir / "hf" / "4").items():
        np.testing.assert_allclose(value, merged[name], rtol=0, atol=1e-6, err_msg=name)
    assert any(np.abs(value - before[name]).max() > 1e-3 for name, value in merged.items())
