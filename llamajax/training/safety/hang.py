"""End a process whose step never ends, after writing the stacks of all its threads."""

import contextlib
import faulthandler
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from llamajax.errors import ExitCode, say_last

_TICKS_A_LIMIT = 20
_LONGEST_TICK_S = 5.0
_EXIT_WITHIN_S = 30.0


class HangWatch:
    """Watches a block for `limit_s` seconds without a `beat`; None: not at all.

    Time is counted in ticks of this process's own, so that one that was stopped (SIGSTOP, a closed
    laptop) does not find itself hung when it continues. A thread that holds the interpreter for
    ever cannot be seen from here; the launcher's `--timeout_s` sees it. file: for the stacks, which
    go to stderr as well. on_hang: called with the reason before the process ends.
    """

    def __init__(
        self,
        limit_s: float | None,
        *,
        file: Path,
        on_hang: Callable[[str], None],
        exit_process: Callable[[int], None] = os._exit,
    ):
        self._limit_s = limit_s
        self._file, self._on_hang, self._exit = file, on_hang, exit_process
        self._quiet_s, self._pauses = 0.0, 0
        self._done = threading.Event()

    def beat(self) -> None:
        """Note that something was finished: a step, or a batch of an evaluation."""
        self._quiet_s = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch what has a limit of its own, such as a save."""
        self._pauses += 1
        try:
            yield
        finally:
            self._quiet_s = 0.0
            self._pauses -= 1

    def __enter__(self) -> "HangWatch":
        self._quiet_s = 0.0
        if self._limit_s is not None:
            self._done.clear()
            threading.Thread(target=self._watch, name="hang_watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        tick_s = min(_LONGEST_TICK_S, self._limit_s / _TICKS_A_LIMIT)
        while not self._done.wait(tick_s):
            self.tick(tick_s)

    def tick(self, seconds: float) -> None:
        """Add `seconds` to the time without a beat; end the process at the limit."""
        if self._pauses:
            return
        self._quiet_s += seconds
        if self._quiet_s >= self._limit_s:
            self._quiet_s = 0.0
            self._end()

    def _end(self) -> None:
        # What hung the run, such as a dead file system, may block all that follows.
        in_any_case = threading.Timer(_EXIT_WITHIN_S, self._exit, (ExitCode.FAILED,))
        in_any_case.daemon = True
        in_any_case.start()
        text = f"no step was finished within {self._limit_s:g} s (guard.hang_timeout_s)"
        try:
            faulthandler.dump_traceback(file=2, all_threads=True)
            with contextlib.suppress(OSError):
                self._file.parent.mkdir(exist_ok=True)
                with self._file.open("w") as stream:
                    faulthandler.dump_traceback(file=stream, all_threads=True)
            self._on_hang(text)
            say_last(
                f"error: {text}: this process ends with code {ExitCode.FAILED:d}; its stacks are "
                f"above and in {self._file}. A rerun continues from the last checkpoint"
            )
        finally:
            in_any_case.cancel()
            self._exit(ExitCode.FAILED)
