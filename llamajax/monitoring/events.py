"""`events.jsonl`: what happened to a run and when, one JSON object a line, only ever appended to.

Every line has `event`, `step` and `time_s` (wall clock, seconds since 1970). What takes time is
written when it is over, with `duration_s`: the seconds in which no step was in flight.
"""

import fcntl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamajax.errors import UserError, say
from llamajax.monitoring.metrics import append_whole, decode_row, encode_row

EVENTS = "events.jsonl"
LOCK = ".lock_{process_id}"


class EventLog:
    """Appends events to `workdir/events.jsonl`. Not primary: does nothing at all.

    when_accepted: makes a change to the disk, perhaps later; lines are kept until then. Those that
    a full disk refuses are kept as well, and written with a later one. A directory that has gone is
    a UserError, once.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        primary: bool,
        when_accepted: Callable[[Callable[[], None]], None] = lambda change: change(),
    ):
        self._file, self._primary = Path(workdir) / EVENTS, primary
        self._lock = threading.Lock()
        self._kept, self._refused, self._begun = b"", False, False
        self._wall_s = time.time() - time.monotonic()
        when_accepted(self._begin)

    @property
    def time_s(self) -> float:
        """The wall clock as it was at the start, plus the time since: it never jumps."""
        return self._wall_s + time.monotonic()

    def write(self, event: str, *, step: int, **fields: Any) -> None:
        """Append one event."""
        if not self._primary:
            return
        row = {"event": event, "step": step, "time_s": self.time_s} | fields
        with self._lock:
            self._kept += f"{encode_row(row)}\n".encode()
            self._flush()

    def _begin(self) -> None:
        with self._lock:
            self._begun = True
            self._flush()

    def close(self) -> None:
        """Write what a full disk refused, or warn that it is lost."""
        with self._lock:
            self._flush()
            if self._kept and self._begun:
                lost = self._kept.decode().splitlines()
                say(f"warning: {self._file}: there was no room for its last lines: {lost}")

    def check_directory(self) -> None:
        """Raise UserError where the directory of the run has gone."""
        if self._primary and not self._file.parent.is_dir():
            self._primary = False  # the error is raised once
            raise UserError(
                f"--workdir={self._file.parent} has gone while the run was using it: nothing can "
                "be saved. Bring it back (is it mounted?); a rerun continues from the last "
                "checkpoint in it"
            )

    def _flush(self) -> None:
        if not self._begun or not self._kept:
            return
        self.check_directory()
        try:
            self._append()
        except OSError as error:
            if not self._refused:
                say(f"warning: {self._file}: {error.strerror}; its lines are kept for later")
            self._refused = True

    def _append(self) -> None:
        with self._file.open("a+b", buffering=0) as file:
            torn = b""
            if end := file.seek(0, 2):
                file.seek(end - 1)
                torn = b"" if file.read(1) == b"\n" else b"\n"  # a killed writer's last line
            append_whole(file.fileno(), torn + self._kept)
        self._kept = b""


def load_events(workdir: Path) -> list[dict[str, Any]]:
    """Return all whole events in file order; none where there is no file."""
    try:
        lines = (Path(workdir) / EVENTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = map(decode_row, lines)
    return [row for row in rows if row and "event" in row and "time_s" in row]


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
