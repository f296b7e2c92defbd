"""The part of a save that Orbax does. Importing it takes a third of a second."""

from collections.abc import Callable, Mapping
from typing import Any

import orbax.checkpoint as ocp

from llamajax.backends.jax_private import orbax_tensorstore
from llamajax.backends.jax_private.literal_glob import take_directories_literally
from llamajax.checkpoint.location import RETRIES, Location, is_remote
from llamajax.checkpoint.worker_thread import KeptWorkers
from llamajax.processes.save_barrier import SaveBarrier

# Orbax's own default (20 minutes) is less than a 70B state takes on a slow disk.
_TIMEOUT_S = 3 * 3600


class OrbaxWriter:
    """Writes states under `directory` asynchronously. All processes create one.

    seal: called on process 0 after all files are written, before the rename that commits them.
    """

    def __init__(self, directory: Location, *, seal: Callable[[], None]):
        options = {"file_io_concurrency": {"limit": "shared"}}  # the queue that KeptWorkers knows
        if is_remote(directory):
            options["gcs_request_retries"] = RETRIES
        else:
            take_directories_literally()
        orbax_tensorstore.set_options(options)
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
        self._orbax.save(directory, args=ocp.args.Composite(state=ocp.args.PyTreeSave(leaves)))

    def wait(self) -> None:
        """Block until what `save` started is committed. Raises what went wrong there."""
        self._orbax.wait_until_finished()

    def close(self) -> None:
        """Release the threads."""
        self._orbax.close()
        self._workers.close()
