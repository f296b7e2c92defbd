"""Short runs of one and of several processes, and a way to hurt them."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import warm

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


def prepare(folder: Path, texts: list[str], *, validation_fraction: float) -> Path:
    """Prepare a corpus as bytes; the directory of it."""
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = [f"--input={folder / 'a.jsonl'}", "--tokenizer=byte", "--workers=1"]
    flags += [f"--output={folder / 'data'}", f"--validation_fraction={validation_fraction}"]
    finish([sys.executable, "-m", "llamajax.prepare", *flags])
    return folder / "data"


def train(data: Path, workdir: Path, devices: int, **keys: object) -> list[str]:
    """A command that trains in one process; keys: overrides, with __ for a point."""
    values = SHORT | {"backend.num_cpu_devices": devices}
    values |= {key.replace("__", "."): value for key, value in keys.items()}
    command = [sys.executable, "-m", "llamajax.train", f"--config={CONFIG}:{data}"]
    return [*command, f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in values.items())]


def launch(command: list[str], *flags: str, processes: int = 2) -> list[str]:
    """A command that launches another one as several processes."""
    own = [sys.executable, "-m", "llamajax.launch", f"--processes_per_node={processes}"]
    return [*own, "--backoff_s=0", *flags, "--", *command]


def finish(*commands: list[str], **variables: str) -> None:
    """Run commands at one time to their successful end; variables: of the environment, by rank."""
    started = [
        warm.Popen(
            command,
            env=os.environ | {name: text.format(rank=rank) for name, text in variables.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    texts = [process.communicate(timeout=300)[0] for process in started]
    assert {process.returncode for process in started} == {0}, "\n".join(texts)


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
