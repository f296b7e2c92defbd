"""Collectives on values of the host: errors, decisions and sizes that all processes must share.

A process that fails alone leaves the others waiting for it in their next collective. Each function
here must be called by all processes, at the same point of the program.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from llamajax.errors import ExitCode, TransientError, UserError

_PAD_BYTES = 1024  # texts are padded to multiples: each other length is a program to compile
# Network file systems show a new file to other hosts only after their caches' time.
_SHARED_WITHIN_S = 30
T = TypeVar("T")


def all_gather_host(number: int) -> list[int]:
    """Return the number that each process passes, by process."""
    if jax.process_count() == 1:
        return [number]
    # As two halves: JAX's integers have 32 bits.
    halves = np.array(divmod(number, 1 << 31), np.int32)
    rows = np.asarray(multihost_utils.process_allgather(halves))
    return [(int(high) << 31) + int(low) for high, low in rows]


def all_gather_text(text: str) -> list[str]:
    """Return the text that each process passes, by process."""
    if jax.process_count() == 1:
        return [text]
    encoded = text.encode()
    longest = max(all_gather_host(len(encoded)))
    if not longest:
        return [""] * jax.process_count()
    padded = encoded.ljust(-(-longest // _PAD_BYTES) * _PAD_BYTES, b"\0")
    rows = np.asarray(multihost_utils.process_allgather(np.frombuffer(padded, np.uint8)))
    return [bytes(row).rstrip(b"\0").decode() for row in rows]


def first_problem(problem: str | None) -> str | None:
    """Return on all processes the first problem that any of them has; None if none has one."""
    return next(filter(None, all_gather_text(problem or "")), None)


def raise_together(error: UserError | None) -> None:
    """Raise on all processes the first error that any of them has."""
    if found := first_problem(None if error is None else f"{error.exit_code:d} {error}"):
        code, _, text = found.partition(" ")
        raise (TransientError if int(code) == ExitCode.TRANSIENT else UserError)(text)


@contextlib.contextmanager
def raising_together() -> Iterator[None]:
    """Raise on all processes the first UserError that the block raises on any of them."""
    error = None
    try:
        yield
    except UserError as raised:
        error = raised
    raise_together(error)


def broadcast_from_first(decide: Callable[..., T], *args: Any) -> T:
    """Return on all processes what `decide(*args)` returns on process 0; it runs there only.

    For what is read from a shared directory, which two processes may see a moment apart. The
    result must be JSON. Raises the UserError of `decide` on all processes.
    """
    found = None
    with raising_together():
        if jax.process_index() == 0:
            found = decide(*args)
    return found if jax.process_count() == 1 else json.loads(all_gather_text(json.dumps(found))[0])


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
