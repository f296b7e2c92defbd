"""Copy standard error to a file, each line with its time."""

import contextlib
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from llamajax.monitoring.terminal_thread import TerminalThread, without_waiting


class LogCopy:
    """A context in which each line of standard error is also written, with the time, to a file.

    Lines are kept in memory until `begin`. It can be entered several times. stream: standard error
    itself, with a thread before it where it is a terminal, so that no line waits; a live view
    replaces it while it is on the screen.
    """

    def __init__(self, file: Path):
        self.stream: TextIO | None = None
        self._file, self._replaced, self._screen = file, None, None
        self._lock = threading.Lock()
        self._line, self._kept, self._begun = "", [], False

    def __enter__(self) -> "LogCopy":
        if self._screen is None and sys.stderr is not None:
            self._screen = without_waiting(sys.stderr)
        self.stream = self._screen
        self._replaced, sys.stderr = sys.stderr, self
        return self

    def __exit__(self, *_: object) -> None:
        self.drain()
        sys.stderr = self._replaced

    def drain(self) -> None:
        """Wait until a terminal shows what was written, but not long."""
        if isinstance(self._screen, TerminalThread):
            self._screen.drain()

    def begin(self) -> None:
        """Write the lines that were kept, and all later ones at once."""
        with self._lock:
            self._begun = True
            self._flush()

    def write(self, text: str) -> int:
        """Write to standard error and to the file."""
        with self._lock:
            # A progress bar writes over itself: only what follows its last return counts.
            found = (self._line + text).split("\n")
            *lines, self._line = (line.rpartition("\r")[2] for line in found)
            self._keep(lines)
        return self.stream.write(text) if self.stream is not None else len(text)

    def add(self, line: str) -> None:
        """Write a whole line to the file alone."""
        with self._lock:
            self._keep([line])

    def _keep(self, lines: list[str]) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._kept += [f"{now}  {line}\n" for line in lines]
        self._flush()

    def _flush(self) -> None:
        if self._begun and self._kept:
            with contextlib.suppress(OSError), self._file.open("a", errors="replace") as file:
                file.writelines(self._kept)
            self._kept = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
