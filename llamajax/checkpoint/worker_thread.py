"""Keep TensorStore working when the wall clock is set back."""

import threading

import numpy as np
import tensorstore as ts

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
