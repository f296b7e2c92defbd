"""The barrier of a save in several processes: a failure of one is known to all at once.

Orbax waits at a barrier when all processes have written, and at another when process 0 has
committed. Where the disk of one process refuses, that process stays away, and the others wait for
it for ten minutes. Here each barrier of Orbax is two: all come to the first, "finished", the failed
one as well; only those that wrote everything come to the second, "complete". Who waits at the
second knows that the others are past the first, so a short timeout is enough.
"""

import contextlib
from collections.abc import Callable

# How long a process that is done waits for the slowest to finish writing.
_FINISHED_MS = 600_000
# And then for the others to be complete: milliseconds, but for a host that pauses. A false alarm
# costs one checkpoint; the wait is in the background.
_COMPLETE_MS = 20_000
_BARRIERS_OF_ORBAX = 2


class SaveBarrier:
    """Orbax's `barrier_sync_fn`. Call `begin` before each save, `failed` after one that failed."""

    def __init__(self, barrier: Callable[..., None]):
        """barrier: returns when all processes called it with `key`; raises after `timeout_ms`."""
        self._barrier = barrier
        self._save = 0
        self._next = _BARRIERS_OF_ORBAX  # number of the barrier to come in this save

    def begin(self) -> None:
        """Start a new save, on all processes."""
        self._save += 1
        self._next = 0

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Wait for all processes. Raises JAX's RuntimeError where one of them failed.

        key: Orbax's, which only those know that came this far; not used.
        """
        number, self._next = self._next, _BARRIERS_OF_ORBAX
        self._wait(number, "finished", min(timeout_ms, _FINISHED_MS))
        self._wait(number, "complete", min(timeout_ms, _COMPLETE_MS))
        self._next = number + 1

    def failed(self) -> None:
        """Tell the other processes; all of them have finished writing when this returns."""
        number, self._next = self._next, _BARRIERS_OF_ORBAX
        if number < _BARRIERS_OF_ORBAX:
            with contextlib.suppress(RuntimeError):  # another one is gone for good
                self._wait(number, "finished", _FINISHED_MS)

    def _wait(self, number: int, what: str, timeout_ms: int) -> None:
        self._barrier(key=f"llamajax:save_{self._save}:{number}:{what}", timeout_ms=timeout_ms)
