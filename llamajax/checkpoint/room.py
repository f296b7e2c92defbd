"""What the disk of each process says to a save: room, permission, and whether it is one disk."""

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from llamajax.checkpoint import manifest as manifests
from llamajax.checkpoint.storage import (
    Place,
    error_type,
    failures,
    files,
    how_to_mend,
    is_directory,
    is_remote,
)
from llamajax.processes.agreement import agree, gathered, told

# Network file systems show a new directory to other hosts only after their caches' time.
_SHOWN_WITHIN_S = 30


def make_sure_of_room(directory: Place, leaves: Mapping[str, Any]) -> list[int]:
    """The processes that have something to write; each has the room for it.

    OSError on all processes when the disk of one cannot take what it would write. A disk that fills
    half-way is survived as well, but TensorStore's threads then print a traceback for every array.
    """
    needed = sum(_local_bytes(leaf) for leaf in leaves.values())
    problem = None
    oldest = told(_oldest(directory) if jax.process_index() == 0 else None)
    try:
        # Orbax would wait for hours for a directory that this process cannot see.
        if oldest is not None and not is_directory(directory / str(oldest)):
            raise OSError(0, f"there is no {directory / str(oldest)}; is the mount gone?")
        if not is_remote(directory):
            directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(directory).free
            if needed > free:
                what = f"{needed:,} bytes are needed, {free:,} are free"
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {what}")
        _try_to_write(directory)
    except failures(directory) as error:
        problem = here(reason(error))
    if problem := agree(problem):
        raise OSError(0, problem)
    return [rank for rank, size in enumerate(gathered(needed)) if size]


def _oldest(directory: Place) -> int | None:
    """A checkpoint that all processes see, if the directory is still the one that they share: it
    is there for so long that no file system's cache hides it."""
    try:
        return next((int(path.name) for path in manifests.step_directories(directory)), None)
    except failures(directory):
        return None  # said below


def see_all_parts(state: Place, writers: Sequence[int]) -> None:
    """OSError unless the part of each process is there: one whose mount is gone may write into an
    empty directory of its own, and see nothing wrong."""
    missing = [state / f"ocdbt.process_{rank}" for rank in writers]
    if is_remote(state):  # shown at once, or not there
        there = {name.partition("/")[0] for name in files(state)}
        missing = [path for path in missing if path.name not in there]
    deadline = time.monotonic() + _SHOWN_WITHIN_S
    while missing := [path for path in missing if not path.is_dir()]:
        if time.monotonic() > deadline:
            ranks = ", ".join(path.name.rpartition("_")[2] for path in missing)
            raise OSError(0, f"what process {ranks} wrote is not in {state.parent.parent}")
        time.sleep(0.2)


def reason(error: BaseException) -> str:
    """The cause of a failed save on one line, in the system's own words where it has some."""
    if isinstance(error, TimeoutError):
        return "another process failed, or did not finish in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    # TensorStore: `...: No space left on device [os_error_code='28']`.
    if found := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(found.group(1)))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def reached(directory: Place) -> Iterator[None]:
    """An object store that fails in here is a UserError with what to check."""
    try:
        yield
    except failures(directory) as error:
        if not is_remote(directory):
            raise
        problem = here(f"{directory} cannot be reached: {reason(error)}")
        raise error_type(error, directory)(f"{problem}; {how_to_mend(directory)}") from None


def here(problem: str) -> str:
    """The problem, with the process that has it where there are several."""
    if jax.process_count() == 1 or problem.startswith("process "):
        return problem
    return f"process {jax.process_index()}: {problem}"


def _try_to_write(directory: Place) -> None:
    """One of `failures` where this process cannot write: read only, no inode left, no mount."""
    probe = directory / f".probe_{jax.process_index()}"
    probe.write_bytes(b"x")
    probe.unlink()


def _local_bytes(leaf: Any) -> int:
    """Bytes of a leaf that this process writes: each part of an array is written once."""
    if not isinstance(leaf, jax.Array):
        return leaf.nbytes
    return sum(shard.data.nbytes for shard in leaf.addressable_shards if shard.replica_id == 0)
