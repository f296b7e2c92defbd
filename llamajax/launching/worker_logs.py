"""The log of a worker: one file an attempt, kept; the first worker's also on the terminal."""

import contextlib
import os
import re
import select
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from llamajax.errors import say
from llamajax.files import replaced_file

_TAIL_BYTES = 1 << 16


def log_path(log_dir: Path, rank: int, attempt: int) -> Path:
    """Return the path of a log, such as `worker_3.0.log` of worker 3 at the first attempt."""
    return log_dir / f"worker_{rank}.{attempt}.log"


def next_attempt(log_dir: Path, ranks: Iterable[int]) -> int:
    """Return the first attempt of which none of these workers has a log, so that none is lost."""
    wanted, taken = set(ranks), [-1]
    for path in log_dir.glob("worker_*.*.log"):
        match = re.fullmatch(r"worker_(\d+)\.(\d+)\.log", path.name)
        if match and int(match.group(1)) in wanted:
            taken.append(int(match.group(2)))
    return max(taken) + 1


def open_log(log_dir: Path, rank: int, attempt: int) -> BinaryIO:
    """Open the file that a worker writes to; `worker_RANK.log` then points to it.

    Where the folder has become unwritable since the start, a temporary file takes its place.
    """
    path = log_path(log_dir, rank, attempt)
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        say(
            f"warning: {path} cannot be written: {error.strerror}; what worker {rank} prints is "
            "kept for the message of a failure only"
        )
        return tempfile.TemporaryFile("a+b")
    newest = log_dir / f"worker_{rank}.log"
    with contextlib.suppress(OSError), replaced_file(newest) as hidden:
        hidden.symlink_to(path.name)  # OSError: a file system without links
    return file


def last_lines(log: int, count: int) -> list[str]:
    """Return the last lines of an open log, without empty ones; of a bar, its last state.

    log: a descriptor, which outlives the file's name.
    """
    text = ""
    with contextlib.suppress(OSError):
        end = os.fstat(log).st_size
        text = os.pread(log, _TAIL_BYTES, max(0, end - _TAIL_BYTES)).decode(errors="replace")
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in lines if line][-count:]


class Echo:
    """Copies what is new in a log, from one descriptor to another; never waits for its reader."""

    def __init__(self, log: int, descriptor: int):
        self._log, self._descriptor = log, descriptor
        self._copied = 0

    def copy(self) -> None:
        """Write what came since the last call. What is refused for good is in the log only."""
        while select.select([], [self._descriptor], [], 0)[1]:
            part = b""
            with contextlib.suppress(OSError):  # the file system has lost the log
                # So much a pipe takes that is writable.
                part = os.pread(self._log, select.PIPE_BUF, self._copied)
            if not part:
                return
            try:
                self._copied += os.write(self._descriptor, part)
            except OSError:  # a full disk; a reader that is gone
                self._copied += len(part)
