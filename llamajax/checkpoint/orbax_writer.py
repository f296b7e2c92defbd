"""The part of a save that Orbax does. Importing it takes a third of a second."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from llamajax.backends.jax_private import orbax_tensorstore
from llamajax.backends.jax_private.literal_glob import take_directories_literally
from llamajax.backends.object_stores import SCHEMES, kvstore_spec
from llamajax.checkpoint.location import Location, is_remote
from llamajax.processes.save_barrier import SaveBarrier

# Orbax's own default (20 minutes) is less than a 70B state takes on a slow disk.
_TIMEOUT_S = 3 * 3600
_OBJECT_BYTES = 400 << 20  # about: Orbax's choice for gs://; an upload that fails starts again
_EVERY_S = 5.0  # TensorStore ends a thread that had nothing to do for 20 s


class KeptWorkers:
    """Gives TensorStore's threads something to do every few seconds, until `close`.

    TensorStore (0.1.86, `pool_impl.cc`, `task_group_impl.cc`) reads the wall clock to start a
    thread (5 ms after the last one) and to free one from its queue (20 ms after its last task).
    Once the clock is set back an hour, a save without a free thread takes an hour. A task in each
    queue, that for files and that for copies, keeps one thread alive and frees the others.
    """

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._file = ts.KvStore.open({"driver": "file", "path": "/dev/"}).result()
        array = {"driver": "zarr", "kvstore": "memory://"}
        self._array = ts.open(array, create=True, dtype=ts.int8, shape=[1]).result()
        self._array.write(np.ones(1, np.int8)).result()
        threading.Thread(target=self._keep, name="tensorstore_workers", daemon=True).start()

    def _keep(self) -> None:
        while True:
            self._file.read("null").result()  # microseconds, and no disk is touched
            self._array.read().result()
            if self._closed.wait(_EVERY_S):
                return

    def close(self) -> None:
        """Let the threads end."""
        self._closed.set()


class OrbaxWriter:
    """Writes states under `directory` asynchronously. All processes create one.

    seal: called on process 0 after all files are written, before the rename that commits them.
    """

    def __init__(self, directory: Location, *, seal: Callable[[], None]):
        if is_remote(directory):
            orbax_tensorstore.take_urls(kvstore_spec, SCHEMES)
        else:
            take_directories_literally()
        # The queue that KeptWorkers knows.
        orbax_tensorstore.set_options({"file_io_concurrency": {"limit": "shared"}})
        self._file_bytes = _OBJECT_BYTES if is_remote(directory) else None
        self._workers = KeptWorkers()
        self.save_barrier = SaveBarrier(ocp.multihost.get_barrier_sync_fn())
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                # Trained weights are noise to a compressor: 10 % smaller for twice the time.
                state=ocp.PyTreeCheckpointHandler(use_compression=False, use_zarr3=False)
            ),
            async_options=ocp.AsyncOptions(
                timeout_secs=_TIMEOUT_S,
                barrier_sync_fn=self.save_barrier,
                post_finalization_callback=seal,
                # Makes an unwritable directory an error of save() itself.
                create_directories_asynchronously=False,
            ),
        )

    def save(self, directory: Location, leaves: Mapping[str, Any]) -> None:
        """Start to write the leaves; return when they may be overwritten or donated."""
        self.save_barrier.begin()
        state = ocp.args.PyTreeSave(leaves, ocdbt_target_data_file_size=self._file_bytes)
        self._orbax.save(directory, args=ocp.args.Composite(state=state))

    def wait(self) -> None:
        """Block until what `save` started is committed. Raises what went wrong there."""
        self._orbax.wait_until_finished()

    def close(self) -> None:
        """Release the threads."""
        self._orbax.close()
        self._workers.close()
