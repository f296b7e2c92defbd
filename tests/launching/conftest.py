"""Launches of tiny commands that stand for workers: what they do depends on rank and attempt."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from shell import verb

from llamajax.launching.launch_options import LaunchOptions
from llamajax.launching.launcher import launch

# Before every fake worker's own lines: who it is, and how often it was started (from its log).
_PREAMBLE = """
import os, signal, sys
from pathlib import Path
rank = int(os.environ["LLAMAJAX_PROCESS_ID"])
attempt = int((Path(os.readlink("/proc/self/fd/1")).suffixes[-2:] or [".-1"])[0][1:])
def print(*values):  # one write, so that no signal handler's line lands inside it
    os.write(1, (" ".join(map(str, values)) + "\\n").encode())
def wait_for(text, *, of):  # in the log of another worker of this attempt
    log = Path(os.readlink("/proc/self/fd/1")).with_name(f"worker_{of}.{attempt}.log")
    while not (log.exists() and text in log.read_text()):
        os.sched_yield()
def wait_for_ever():
    os.read(int(os.environ["LLAMAJAX_PARENT_PIPE"].partition(":")[0]), 1)  # till the launcher ends
    os._exit(1)
"""


def fake_worker(lines: str) -> tuple[str, ...]:
    """The command of a worker that runs `lines`; they know `rank` and `attempt`."""
    return (sys.executable, "-S", "-c", _PREAMBLE + lines)


@pytest.fixture
def launch_command(tmp_path: Path):
    """The command of a launch in a process of its own: one worker, logs in `tmp_path`."""

    def command(lines: str) -> list[str]:
        flags = ("--processes_per_node=1", "--backoff_s=0", f"--log_dir={tmp_path}")
        return verb("launch", *flags, "--", *fake_worker(lines))

    return command


@pytest.fixture
def launched(tmp_path: Path):
    """Launches workers on one node, in this process; gives the exit code."""

    def run(lines: str, **overrides) -> int:
        values = {"processes_per_node": 2, "max_restarts": 0, "backoff_s": 0.0, "timeout_s": 60.0}
        logs, command = str(tmp_path / "logs"), fake_worker(lines)
        return launch(LaunchOptions(command=command, log_dir=logs, **values | overrides))

    return run


@pytest.fixture
def free_ports() -> int:
    """A port of this machine that is free, and so is the next one."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except OSError:
                continue


@pytest.fixture(autouse=True)
def _no_accelerators(monkeypatch):
    """The devices of the machine that runs the tests are no subject of theirs."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name in [n for n in os.environ if n.startswith(("SLURM_", "LLAMAJAX_"))]:
        monkeypatch.delenv(name)


class Node:
    """A launcher started by hand as one of several nodes."""

    def __init__(self, process: subprocess.Popen, logs: Path):
        self.process, self.logs = process, logs

    def wait(self) -> tuple[int, str]:
        """Its exit code and what it said."""
        err = self.process.communicate(timeout=60)[1]
        return self.process.returncode, err

    def log(self, rank: int, attempt: int) -> str:
        """What a worker wrote; waits for the first line."""
        path, poll = self.logs / f"worker_{rank}.{attempt}.log", threading.Event()
        while self.process.poll() is None and not (path.exists() and "\n" in path.read_text()):
            poll.wait(0.01)
        return path.read_text()


@pytest.fixture
def start_node(tmp_path: Path, free_ports: int):
    """Starts launchers of the nodes of one run; ends them after the test."""
    nodes = []

    def start(node_rank: int, lines: str, *arguments: str, nodes_in_all: int = 2) -> Node:
        logs = tmp_path / f"logs_{node_rank}"
        flags = [f"--nodes={nodes_in_all}", f"--node_rank={node_rank}"]
        flags += [f"--coordinator=127.0.0.1:{free_ports}", f"--log_dir={logs}"]
        flags += ["--processes_per_node=2", "--backoff_s=0", *arguments]
        process = subprocess.Popen(
            verb("launch", *flags, "--", *fake_worker(lines)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        nodes.append(Node(process, logs))
        return nodes[-1]

    yield start
    for node in nodes:
        node.process.kill()
        node.process.communicate()
