"""`events.jsonl`: what happened to a run and when, one JSON object a line, only ever appended to.

Every line has `event`, `step` and `time_s` (wall clock, seconds since 1970). What takes time is
written when it is over, with `duration_s`: the seconds in which no step was in flight.
"""

import fcntl
import time
from pathlib import Path
from typing import Any

from llamajax.errors import UserError
from llamajax.monitoring.jsonl import RowFile, read_rows

EVENTS = "events.jsonl"
LOCK = ".lock_{process_id}"  # each process of a run holds its own


class EventLog(RowFile):
    """Appends events to `workdir/events.jsonl`. Not primary: does nothing at all.

    A directory that is gone is a UserError, once.
    """

    def __init__(self, workdir: Path, *, primary: bool):
        super().__init__(Path(workdir) / EVENTS)
        self._directory, self._primary = Path(workdir), primary
        self._wall_s = time.time() - time.monotonic()

    @property
    def time_s(self) -> float:
        """The wall clock at the start plus the time since: it never jumps."""
        return self._wall_s + time.monotonic()

    def write(self, event: str, *, step: int, **fields: Any) -> None:
        """Append one event."""
        if self._primary:
            if self._begun:
                self.check_directory()
            self.add({"event": event, "step": step, "time_s": self.time_s} | fields)

    def check_directory(self) -> None:
        """Raise UserError where the directory of the run is gone."""
        if self._primary and not self._directory.is_dir():
            self._primary = False  # the error is raised once
            raise UserError(
                f"--workdir={self._directory} has gone while the run was using it: nothing can "
                "be saved. Bring it back (is it mounted?); a rerun continues from the last "
                "checkpoint in it"
            )


def load_events(workdir: Path) -> list[dict[str, Any]]:
    """Return all whole events in file order; none where there is no file."""
    rows = read_rows(Path(workdir) / EVENTS)
    return [row for row in rows if "event" in row and "time_s" in row]


def is_running(workdir: Path) -> bool:
    """Return whether a process holds the lock of a run; True where the file system has no locks."""
    try:
        with (Path(workdir) / LOCK.format(process_id=0)).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
