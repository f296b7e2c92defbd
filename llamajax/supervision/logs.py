"""The log of a worker: one file an attempt, kept; the first worker's also on the terminal."""

import contextlib
import os
import re
import select
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

_TAIL_BYTES = 1 << 16


def log_path(log_dir: Path, rank: int, attempt: int) -> Path:
    """`worker_3.0.log`: of worker 3 at the first attempt."""
    return log_dir / f"worker_{rank}.{attempt}.log"


def next_attempt(log_dir: Path, ranks: Iterable[int]) -> int:
    """The first attempt of which none of these workers has a log: an earlier launch's stay."""
    wanted, taken = set(ranks), [-1]
    for path in log_dir.glob("worker_*.*.log"):
        match = re.fullmatch(r"worker_(\d+)\.(\d+)\.log", path.name)
        if match and int(match.group(1)) in wanted:
            taken.append(int(match.group(2)))
    return max(taken) + 1


def open_log(log_dir: Path, rank: int, attempt: int) -> BinaryIO:
    """The file that a worker writes to; `worker_RANK.log` then points to it."""
    path = log_path(log_dir, rank, attempt)
    file = path.open("ab")
    newest, hidden = log_dir / f"worker_{rank}.log", log_dir / f".worker_{rank}.log"
    hidden.unlink(missing_ok=True)
    hidden.symlink_to(path.name)
    hidden.replace(newest)
    return file


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log, without empty ones; a progress bar counts with its last state."""
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in lines if line][-count:]


class Echo:
    """Copies what is new in a log to a descriptor, as far as that takes it; never waits for it."""

    def __init__(self, path: Path, descriptor: int):
        self._file, self._descriptor = path.open("rb"), descriptor

    def copy(self) -> None:
        """Write what came since the last call. What is refused for good is in the log only."""
        while select.select([], [self._descriptor], [], 0)[1]:
            part = self._file.read(select.PIPE_BUF)  # so much a pipe takes that is writable
            if not part:
                return
            with contextlib.suppress(OSError):  # a full disk; a reader that is gone
                rest = os.write(self._descriptor, part) - len(part)
                self._file.seek(rest, os.SEEK_CUR)

    def close(self) -> None:
        """Copy the rest and release the file."""
        self.copy()
        self._file.close()
