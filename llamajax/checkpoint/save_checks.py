"""Check before and after a save that every process can write, has room, and shares one disk."""

import errno
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from llamajax.checkpoint import location
from llamajax.checkpoint import manifest as manifests
from llamajax.checkpoint.location import Location
from llamajax.processes.host_collectives import all_gather_host, broadcast_from_first, first_problem

# Network file systems show a new directory to other hosts only after their caches' time.
_SHOWN_WITHIN_S = 30


def check_room(directory: Location, leaves: Mapping[str, Any]) -> list[int]:
    """Return the processes that have something to write, after checking that each can.

    Raises OSError on all processes if one has no room, no permission or not the shared directory.
    A disk that fills during a save is survived as well, but then TensorStore's threads print a
    traceback for every array.
    """
    needed = sum(_local_bytes(leaf) for leaf in leaves.values())
    problem = None
    oldest = None if location.is_remote(directory) else broadcast_from_first(_oldest, directory)
    try:
        # Orbax would wait for hours for a directory that this process cannot see.
        if oldest is not None and not (directory / str(oldest)).is_dir():
            raise OSError(0, f"there is no {directory / str(oldest)}; is the mount gone?")
        if not location.is_remote(directory):
            directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(directory).free
            if needed > free:
                what = f"{needed:,} bytes are needed, {free:,} are free"
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {what}")
        probe = directory / f".probe_{jax.process_index()}"  # read only, no inode, no mount?
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        problem = location.with_rank(location.reason(error))
    if problem := first_problem(problem):
        raise OSError(0, problem)
    return [rank for rank, size in enumerate(all_gather_host(needed)) if size]


def _local_bytes(leaf: Any) -> int:
    """Return the bytes of a leaf that this process writes: one replica of each of its shards."""
    if not isinstance(leaf, jax.Array):
        return leaf.nbytes
    return sum(shard.data.nbytes for shard in leaf.addressable_shards if shard.replica_id == 0)


def _oldest(directory: Location) -> int | None:
    """Return the oldest checkpoint, which no file system's cache hides any more, or None."""
    try:
        return next((int(path.name) for path in manifests.step_directories(directory)), None)
    except OSError:
        return None  # the caller's own access fails next and says why


def check_all_parts(state: Location, writers: Sequence[int]) -> None:
    """Raise OSError unless the part of each writing process is in the saved state.

    A process whose mount is gone writes into an empty directory of its own without an error.
    """
    missing = [state / f"ocdbt.process_{rank}" for rank in writers]
    if location.is_remote(state):  # without a delay, unlike a network file system
        found = {name.partition("/")[0] for name in location.file_sizes(state)}
        missing = [path for path in missing if path.name not in found]
    deadline = time.monotonic() + _SHOWN_WITHIN_S
    while missing := [path for path in missing if not path.is_dir()]:
        if time.monotonic() > deadline:
            ranks = ", ".join(path.name.rpartition("_")[2] for path in missing)
            raise OSError(0, f"what process {ranks} wrote is not in {state.parent.parent}")
        time.sleep(0.2)
