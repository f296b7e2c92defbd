"""Two processes that save together while one of them is hurt; each prints what it saw as JSON.

    python two_savers.py RANK PORT DIRECTORY

DIRECTORY: a path or a URL. Which process is hurt, and how, is written beside each case. A limit on
the size of files makes the disk of one process refuse for real: EFBIG instead of ENOSPC.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_state import checkpointer, flip

from llamajax.checkpoint import (
    Checkpointer,
    CheckpointError,
    location,
    manifest,
    restore,
    save_checks,
)
from llamajax.processes import save_barrier


def run_both(directory: Any) -> dict[str, Any]:
    """Run both processes; return what they saw, which must be the same."""
    import warm  # found by tests, not by the script
    from shell import free_port

    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment.pop("XLA_FLAGS", None)
    command, port = [sys.executable, __file__], str(free_port())
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [
        warm.Popen([*command, str(rank), port, str(directory)], env=environment, **streams)
        for rank in (0, 1)
    ]
    try:
        texts = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], texts[0][1] + texts[1][1]
    seen = [json.loads(out.splitlines()[-1]) for out, _ in texts]
    assert seen[0] == seen[1]
    return seen[0]


def state(value: int):
    """An array of which each process has half, and one that all have."""
    mesh = jax.make_mesh((2,), ("fsdp",))
    w = np.full((2, 4096), value, np.float32)
    put = jax.make_array_from_callback
    return {
        "w": put(w.shape, NamedSharding(mesh, P("fsdp")), lambda index: w[index]),
        "norm": put((8,), NamedSharding(mesh, P()), lambda index: w[0, :8]),
    }


@contextlib.contextmanager
def no_room(hurt: bool):
    """Files of this process cannot grow beyond some bytes, if it is the one to hurt."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if hurt:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tried(saver: Checkpointer, step: int) -> list[Any]:
    """How a save went: the failure, if any, and the steps that are complete after it."""
    try:
        saver.save(step, state(step), meta={"step": step})
        saver.wait()
    except CheckpointError as error:
        return [str(error).partition(";")[0], saver.steps()]
    return ["saved", saver.steps()]


def flipped(saver: Checkpointer, directory: Any, *, rank: int) -> list[Any]:
    """Step and value of what is restored after a byte of a file that one process checks flipped."""
    if rank == 0:
        flip(directory)
    found, words = saver.newest_intact()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )
    w = restore.restore_state(found, abstract)["w"]
    return [found.step, len(words), float(w.addressable_shards[0].data[0, 0])]


def on_a_disk(saver: Checkpointer, directory: Path, *, rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = {"well": tried(saver, 1)}
    with no_room(rank == 1):
        seen["process 1 cannot write"] = tried(saver, 2)
    seen["again"] = tried(saver, 2)
    with no_room(rank == 0):
        seen["process 0 cannot write"] = tried(saver, 3)
    seen["after that"] = tried(saver, 3)
    # The mount of process 1 is gone: what it writes lands in a directory of its own.
    saver.directory = directory if rank == 0 else directory.with_name("elsewhere")
    seen["process 1 elsewhere"] = tried(saver, 4)[0]
    try:
        save_checks.check_all_parts(directory / "3" / manifest.STATE, [0, 1, 7])
    except OSError as error:
        seen["parts"] = error.strerror
    saver.directory = directory
    seen["back"] = tried(saver, 4)
    # Only process 1 sees that the checkpoint of step 4 is damaged.
    real = manifest.check_contents

    def damaged_for_one(path: Path, *rest) -> None:
        if rank == 1 and path.name == "4":
            raise manifest.DamagedError(path / "state", "is damaged for process 1")
        real(path, *rest)

    manifest.check_contents = damaged_for_one
    found, words = saver.newest_intact()
    manifest.check_contents = real
    seen["damage for one"] = [found.step, len(words), "for process 1" in words[0]]
    seen["flipped"] = flipped(saver, directory / "3", rank=rank)
    seen["names"] = sorted(path.name for path in directory.iterdir())
    return seen


def at_a_url(saver: Checkpointer, directory: Any, *, rank: int) -> dict[str, Any]:
    saves = [tried(saver, step) for step in (1, 2, 3, 4)]
    restored = flipped(saver, directory / "4", rank=rank)
    return {"saves": saves, "flipped": restored, "again": tried(saver, 4)}


def main(rank: int, port: str, directory: Any) -> None:
    save_barrier._COMPLETE_MS, save_checks._SHOWN_WITHIN_S = 2000, 1
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    cases = at_a_url if location.is_remote(directory) else on_a_disk
    with checkpointer(directory) as saver:
        seen = cases(saver, directory, rank=rank)
    print(json.dumps(seen))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], location.locate(sys.argv[3]))
