"""Copy standard error to a file, each line with its time; a terminal is written by a thread."""

import contextlib
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

_MOST_WAITING = 1024  # writes
_DRAIN_WITHIN_S = 2.0


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
            self._screen = TerminalThread(sys.stderr) if _is_terminal(sys.stderr) else sys.stderr
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


class TerminalThread:
    """A stream in front of a terminal, which may stop reading: Ctrl-S, a connection that hangs.

    A write returns at once; where too many wait, it is dropped. The thread writes to the descriptor
    itself: a lock of the stream that it held at the end would abort the interpreter.
    """

    def __init__(self, stream: TextIO):
        self._stream, self._descriptor = stream, stream.fileno()
        self._waiting: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self._drained = threading.Event()
        self._drained.set()
        threading.Thread(target=self._run, name="terminal", daemon=True).start()

    def write(self, text: str) -> int:
        """Enter a text; returns at once."""
        if self._waiting.qsize() < _MOST_WAITING:
            self._waiting.put(text)
        return len(text)

    def flush(self) -> None:
        """Do nothing: the thread does not buffer."""

    def drain(self) -> None:
        """Wait until what was entered is on the terminal, but not long, and not again in vain."""
        if self._drained.is_set():
            self._drained = threading.Event()
            self._waiting.put(self._drained)
            self._drained.wait(_DRAIN_WITHIN_S)

    def _run(self) -> None:
        while True:
            entered = self._waiting.get()
            if isinstance(entered, threading.Event):
                entered.set()
                continue
            data = entered.encode(self._stream.encoding, "replace")
            with contextlib.suppress(OSError):  # a terminal that is gone
                while data:
                    data = data[os.write(self._descriptor, data) :]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return os.isatty(stream.fileno())
    except OSError:  # an object that only looks like a stream
        return False
