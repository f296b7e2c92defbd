"""Short runs of one and of several processes, and a way to hurt them."""

import os
import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import warm
from shell import SHORT, started, train_command, verb

KEYS = {"train.steps": 10, "train.eval_every": 5, "backend.name": "cpu", "mesh.fsdp": 2}


def train(data: Path, workdir: Path, devices: int, **keys: object) -> list[str]:
    """A command that trains in one process; keys: overrides, with __ for a point."""
    values = SHORT | KEYS | {"backend.num_cpu_devices": devices}
    values |= {key.replace("__", "."): value for key, value in keys.items()}
    return train_command(data, workdir, values)


def launch(command: list[str], *flags: str, processes: int = 2) -> list[str]:
    """A command that launches another one as several processes."""
    own = (f"--processes_per_node={processes}", "--backoff_s=0", *flags)
    return verb("launch", *own, "--", *command)


def finish(*commands: list[str], **variables: str) -> None:
    """Run commands at one time to their successful end; variables: of the environment, by rank."""
    processes = []
    for rank, command in enumerate(commands):
        own = {name: text.format(rank=rank) for name, text in variables.items()}
        processes.append(started(command, env=os.environ | own))
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert {process.returncode for process in processes} == {0}, "\n".join(texts)


def interrupt(
    command: list[str], number: int, *, rank: int, when: Callable[[], bool]
) -> tuple[int, str]:
    """Send a signal to one worker of a launch as soon as `when()`; exit code and standard error."""
    poll = threading.Event()
    with warm.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        first = process.stderr.readline()
        pids = [int(pid) for pid in re.search(r"pids ([\d, ]+)", first).group(1).split(",")]
        while not when() and process.poll() is None:
            poll.wait(0.001)
        os.kill(pids[rank], number)
        text = process.stderr.read()
    return process.returncode, text
