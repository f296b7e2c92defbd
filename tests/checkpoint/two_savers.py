"""One of two processes that save together while one of them is hurt; prints what it saw as JSON.

    python two_savers.py RANK PORT DIRECTORY

Which process is hurt, and how, is written beside each case. A limit on the size of files makes the
disk of one process refuse for real: EFBIG instead of ENOSPC.
"""

import contextlib
import json
import resource
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llamajax.checkpoint import Checkpointer, CheckpointError, manifest, restore, save_checks
from llamajax.processes import save_barrier

RANK, PORT, DIRECTORY = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
SEEN: dict[str, object] = {}


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
def no_room(rank: int):
    """Files of process `rank` cannot grow beyond some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == RANK:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tried(saver: Checkpointer, step: int) -> list[str]:
    """How a save went: the failure, if any, and the steps that are complete after it."""
    try:
        saver.save(step, state(step), meta={"step": step})
        saver.wait()
    except CheckpointError as error:
        return [str(error).partition(";")[0], saver.steps()]
    return ["saved", saver.steps()]


def parts_missing() -> str:
    """What the commit says where the part of process 7 is not in a checkpoint."""
    try:
        save_checks.check_all_parts(DIRECTORY / "3" / manifest.STATE, [0, 1, 7])
    except OSError as error:
        return error.strerror
    return ""


def main() -> None:
    save_barrier._COMPLETE_MS, save_checks._SHOWN_WITHIN_S = 2000, 1
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    jax.distributed.initialize(f"127.0.0.1:{PORT}", 2, RANK)
    options = {"keep": 3, "keep_every": None, "asynchronous": True}
    saver = Checkpointer(DIRECTORY, **options)
    SEEN["well"] = tried(saver, 1)
    with no_room(1):
        SEEN["process 1 cannot write"] = tried(saver, 2)
    SEEN["again"] = tried(saver, 2)
    with no_room(0):
        SEEN["process 0 cannot write"] = tried(saver, 3)
    SEEN["after that"] = tried(saver, 3)
    # The mount of process 1 is gone: what it writes lands in a directory of its own.
    saver.directory = DIRECTORY if RANK == 0 else DIRECTORY.with_name("elsewhere")
    SEEN["process 1 elsewhere"] = tried(saver, 4)[0]
    SEEN["parts"] = parts_missing()
    saver.directory = DIRECTORY
    SEEN["back"] = tried(saver, 4)
    # Only process 1 sees that the checkpoint of step 4 is damaged.
    real = restore.manifests.check_contents

    def damaged_for_one(directory: Path, *rest) -> None:
        if RANK == 1 and directory.name == "4":
            raise manifest.DamagedError(directory / "state", "is damaged for process 1")
        real(directory, *rest)

    restore.manifests.check_contents = damaged_for_one
    found, words = saver.newest_intact()
    restore.manifests.check_contents = real
    SEEN["damage for one"] = [found.step, len(words), "for process 1" in words[0]]
    # And a byte is flipped in a file that one of the two will check.
    if RANK == 0:
        largest = max((DIRECTORY / "3").rglob("d/*"), key=lambda path: path.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    found, words = saver.newest_intact()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )
    w = restore.restore_state(found, abstract)["w"]
    SEEN["flipped"] = [found.step, float(w.addressable_shards[0].data[0, 0])]
    SEEN["names"] = sorted(path.name for path in DIRECTORY.iterdir())
    saver.close()
    print(json.dumps(SEEN))
    jax.distributed.shutdown()


main()
