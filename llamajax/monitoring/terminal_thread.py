"""A terminal that is written by a thread of its own, so that nobody waits for it."""

import contextlib
import os
import queue
import threading
from typing import Any, TextIO

_MOST_WAITING = 1024  # writes
_DRAIN_WITHIN_S = 2.0


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


def without_waiting(stream: TextIO) -> TextIO:
    """Return a stream that writes without waiting, where `stream` is a terminal; else itself."""
    try:
        stream.fileno()
    except OSError:  # an object that only looks like one
        return stream
    return TerminalThread(stream) if stream.isatty() else stream
