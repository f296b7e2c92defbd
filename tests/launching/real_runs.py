"""Commands of short runs of one and of several processes, and a way to hurt them."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import warm

from llamajax.proving.trial import newest_checkpoint

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


def train(data, workdir, devices: int) -> list[str]:
    keys = SHORT | {"backend.num_cpu_devices": devices}
    command = [sys.executable, "-m", "llamajax.train", f"--config={CONFIG}:{data}"]
    return [*command, f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in keys.items())]


def launch(data, workdir) -> list[str]:
    """Two processes with a device each."""
    command = [sys.executable, "-m", "llamajax.launch", "--processes_per_node=2", "--backoff_s=0"]
    return [*command, "--", *train(data, workdir, 1)]


def interrupted(command, environment, workdir, *, rank: int | None, number: int):
    """Exit code and words of a launch that gets a signal after step 4, itself or one worker."""
    poll = threading.Event()
    with warm.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        first = process.stderr.readline()
        pids = [int(pid) for pid in re.search(r"pids ([\d, ]+)", first).group(1).split(",")]
        while newest_checkpoint(workdir) < 4 and process.poll() is None:
            poll.wait(0.005)
        os.kill(process.pid if rank is None else pids[rank], number)
        text = process.stderr.read()
    return process.returncode, text
