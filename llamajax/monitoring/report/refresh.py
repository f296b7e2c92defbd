"""Keep `report.html` up to date during a run, and write it once more at its end."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import llamajax
from llamajax.errors import say
from llamajax.files import remove_partials
from llamajax.monitoring.events import EVENTS
from llamajax.monitoring.report.run_report import MALFORMED, REPORT, write_report

_LOOK_EVERY_S, _WRITE_EVERY_S = 15.0, 180.0
_IDLE_SHARE = 20  # times as long as the last page took, no other one is written
_NICE = 10
_STOP_WITHIN_S = 5.0
# A run does not fail at its end because its files cannot be reported.
_FAILURES = (OSError, *MALFORMED)


@contextlib.contextmanager
def refreshed_report(workdir: Path, *, primary: bool) -> Iterator[None]:
    """Rewrite the report of a run soon after each event, every few minutes, and at the end.

    A process of its own does it, because reading many rows takes seconds of the interpreter.
    Nothing is written before the start is accepted, which writes the first event. A report that
    fails is one warning. Not primary: does nothing.
    """
    if not primary:
        yield
        return
    workdir = Path(workdir).absolute()
    refresher = _Refresher(workdir)
    thread = threading.Thread(target=refresher.run, name="report", daemon=True)
    thread.start()
    try:
        yield
    finally:
        refresher.stop()
        thread.join()
        if _events_size(workdir) != refresher.before:
            remove_partials(workdir / REPORT)  # of a process that did not end in time
            try:
                write_report(workdir)
            except _FAILURES as error:
                say(f"warning: no report was written: {error}")


def _events_size(workdir: Path) -> int:
    with contextlib.suppress(OSError):
        return (workdir / EVENTS).stat().st_size
    return 0


class _Refresher:
    """Starts the process that writes, one at a time. before: size of the events at the start."""

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self.before = _events_size(workdir)
        self._stopped, self._warned = threading.Event(), False

    def stop(self) -> None:
        """Make `run` return."""
        self._stopped.set()

    def run(self) -> None:
        """Look for new events until `stop`."""
        seen, written_s, took_s = self.before, time.monotonic(), 0.0
        while not self._stopped.wait(max(_LOOK_EVERY_S, _IDLE_SHARE * took_s)):
            size, began_s = _events_size(self._workdir), time.monotonic()
            late = began_s - written_s >= _WRITE_EVERY_S and size != self.before
            if size != seen or late:
                self._write()
                seen, written_s = size, time.monotonic()
                took_s = written_s - began_s

    def _write(self) -> None:
        """Write the report at a low priority; end at once when the run does.

        In a session of its own, so that Ctrl-C reaches the run alone, which then ends it.
        """
        command = [sys.executable, "-m", "llamajax.report", f"--workdir={self._workdir}"]
        home = Path(llamajax.__file__).parents[1]  # so that the same package is found
        try:
            with subprocess.Popen(
                command,
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            ) as child:
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, child.pid, _NICE)
                problem = self._wait(child)
        except OSError as error:
            problem = str(error)
        if problem and not self._warned:
            self._warned = True
            say(f"warning: report.html is not up to date: {problem}; training goes on")

    def _wait(self, child: subprocess.Popen) -> str:
        """Return what went wrong; nothing where the run ended first."""
        while not self._stopped.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, text = child.communicate(timeout=1.0)
                lines = text.strip().splitlines()
                return (lines or [f"exit code {child.returncode}"])[-1] if child.returncode else ""
        child.terminate()
        try:
            child.communicate(timeout=_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            child.kill()
        return ""
