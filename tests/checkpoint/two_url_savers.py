"""One of two processes that save to a URL together; prints what it saw as JSON.

python two_url_savers.py RANK PORT URL
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llamajax.checkpoint import Checkpointer, CheckpointError, location, restore_state

RANK, PORT, URL = int(sys.argv[1]), sys.argv[2], sys.argv[3]


def state(value: int):
    """An array of which each process has half, and one that all have."""
    mesh = jax.make_mesh((2,), ("fsdp",))
    w = np.full((2, 4096), value, np.float32)
    put = jax.make_array_from_callback
    return {
        "w": put(w.shape, NamedSharding(mesh, P("fsdp")), lambda index: w[index]),
        "norm": put((8,), NamedSharding(mesh, P()), lambda index: w[0, :8]),
    }


def tried(saver: Checkpointer, step: int) -> list[object]:
    """How a save went, and the steps that are complete after it."""
    try:
        saver.save(step, state(step), meta={"step": step})
        saver.wait()
    except CheckpointError as error:
        return [str(error).partition(";")[0], saver.steps()]
    return ["saved", saver.steps()]


def main() -> None:
    jax.distributed.initialize(f"127.0.0.1:{PORT}", 2, RANK)
    directory = location.locate(URL)
    saver = Checkpointer(directory, keep=2, keep_every=None, asynchronous=True)
    seen = {"saves": [tried(saver, step) for step in (1, 2, 3)]}
    # A byte is flipped in a file that one of the two will check.
    if RANK == 0:
        found = {n: size for n, size in location.file_sizes(directory / "3").items() if "/d/" in n}
        path = directory / "3" / max(found, key=found.get)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    found, words = saver.newest_intact()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )
    w = restore_state(found, abstract)["w"]
    seen["flipped"] = [found.step, len(words), float(w.addressable_shards[0].data[0, 0])]
    seen["again"] = tried(saver, 3)
    saver.close()
    print(json.dumps(seen))
    jax.distributed.shutdown()


main()
