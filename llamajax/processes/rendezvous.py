"""Where the processes of one save meet: all learn that one of them failed, and nobody waits long.

Orbax lets a process whose disk refused leave, and the others wait for it until they give up, ten
minutes later; the next save would wait with them. Here a process that failed comes to the meeting
as well, and only then stays away: each meeting is two barriers, the first of which says that all
have finished, well or not, and the second that all have finished well. Those who stand at the
second one know that the others are already past the first, so they need not wait long for them.
"""

import contextlib
from typing import Protocol

# How long a process that is done waits for the slowest to finish writing.
_FINISHED_MS = 600_000
# And then for the others to be sound: milliseconds, but for a host that pauses. A false alarm costs
# one checkpoint; the wait is in the background.
_SOUND_MS = 20_000
# Orbax meets when all have written, and again when process 0 has committed.
_MEETINGS = 2


class Barrier(Protocol):
    """Returns when all processes have called it with this key; an error after so long."""

    def __call__(self, *, key: str, timeout_ms: int) -> None: ...


class Rendezvous:
    """The barrier that Orbax is given. `begin` before each save, `failed` after one that failed."""

    def __init__(self, barrier: Barrier):
        self._barrier = barrier
        self._save = 0
        self._meeting = _MEETINGS

    def begin(self) -> None:
        """A new save, on all processes."""
        self._save += 1
        self._meeting = 0

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Wait till all come; raises JAX's runtime error where one of them failed. (Orbax's keys
        are known to those only who came this far, so they are not used.)"""
        meeting, self._meeting = self._meeting, _MEETINGS
        self._wait(meeting, "finished", min(timeout_ms, _FINISHED_MS))
        self._wait(meeting, "sound", min(timeout_ms, _SOUND_MS))
        self._meeting = meeting + 1

    def failed(self) -> None:
        """Tell the others, wherever they wait for this process; all have then finished writing."""
        meeting, self._meeting = self._meeting, _MEETINGS
        if meeting < _MEETINGS:
            with contextlib.suppress(RuntimeError):  # another one is gone for good
                self._wait(meeting, "finished", _FINISHED_MS)

    def _wait(self, meeting: int, what: str, timeout_ms: int) -> None:
        self._barrier(key=f"llamajax:save_{self._save}:{meeting}:{what}", timeout_ms=timeout_ms)
