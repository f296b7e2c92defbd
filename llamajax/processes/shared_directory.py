"""Check that all processes see the same directory."""

import os
import socket
import time
from pathlib import Path

import jax

from llamajax.errors import UserError
from llamajax.processes.host_collectives import broadcast_from_first, raise_together

# Network file systems show a new file to other hosts only after their caches' time.
_SHARED_WITHIN_S = 30


def check_shared_directory(directory: Path, *, key: str) -> None:
    """Raise UserError on all processes unless all see the same directory. To be called by all.

    Process 0 leaves a random token in it, which every other one must find there.
    """
    if jax.process_count() == 1:
        return

    def leave_token() -> str:
        name = f".shared_{os.urandom(8).hex()}"
        (directory / name).touch()
        return name

    file, problem = directory / broadcast_from_first(leave_token), None
    deadline = time.monotonic() + _SHARED_WITHIN_S
    while not (found := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if not found:
        problem = UserError(
            f"{key}={directory} on {socket.gethostname()} (process {jax.process_index()}) is "
            "not the directory of process 0: checkpoints need storage that all nodes share"
        )
    try:
        raise_together(problem)
    finally:
        if jax.process_index() == 0:
            file.unlink(missing_ok=True)
