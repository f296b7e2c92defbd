"""Save checkpoints in forked processes that are killed at chosen file operations; a script.

    python kill_saves.py DIRECTORY STRIDE

Each child saves steps 1 to 4 (keeping one) into its own directory and gets SIGKILL at its k-th file
operation, k = 1, 1 + STRIDE, ... until one survives. Prints one JSON object a child: its directory
and whether it was killed. Forking from a process that has imported but not started JAX saves most
of the time.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.checkpoint import Checkpointer

_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


def arm(directory: Path, *, kill_at: int) -> None:
    """Kill this process at its `kill_at`-th operation (from 1) on files under `directory`."""
    count = 0
    root = str(directory)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _OPERATIONS:
            return
        # Removals by shutil are relative to a directory descriptor: count them all.
        under = event in ("os.remove", "os.rmdir") or str(arguments[0]).startswith(root)
        if under and not (event == "open" and arguments[1] == "r"):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run(directory: Path, *, kill_at: int) -> None:
    """Save four steps; the state of step n is full of n."""
    arm(directory, kill_at=kill_at)
    with Checkpointer(directory, keep=1, keep_every=None, asynchronous=True) as saver:
        for step in range(1, 5):
            state = {"w": np.full(1000, step, np.float32), "step": np.int32(step)}
            saver.save(step, state, meta={"step": step})


def main(root: Path, stride: int) -> None:
    """Fork a child for each kill point, until one survives."""
    kill_at = 1
    while True:
        directory = root / str(kill_at)
        child = os.fork()
        if child == 0:
            run(directory, kill_at=kill_at)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print(json.dumps({"directory": str(directory), "killed": killed}), flush=True)
        if not killed:
            break
        kill_at += stride


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]))
