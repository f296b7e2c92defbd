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
    before, stopped = _events_size(workdir), threading.Event()
    arguments = (workdir, before, stopped)
    thread = threading.Thread(target=_refresh, args=arguments, name="report", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        if _events_size(workdir) != before:
            remove_partials(workdir / REPORT)  # of a process that did not end in time
            try:
                write_report(workdir)
            except _FAILURES as error:
                say(f"warning: no report was written: {error}")


def _events_size(workdir: Path) -> int:
    with contextlib.suppress(OSError):
        return (workdir / EVENTS).stat().st_size
    return 0


def _refresh(workdir: Path, before: int, stopped: threading.Event) -> None:
    """Look for new events until `stopped`. before: size of the events at the start."""
    seen, written_s, took_s, warned = before, time.monotonic(), 0.0, False
    while not stopped.wait(max(_LOOK_EVERY_S, _IDLE_SHARE * took_s)):
        size, began_s = _events_size(workdir), time.monotonic()
        late = began_s - written_s >= _WRITE_EVERY_S and size != before
        if size != seen or late:
            problem = _write(workdir, stopped)
            if problem and not warned:
                warned = True
                say(f"warning: report.html is not up to date: {problem}; training goes on")
            seen, written_s = size, time.monotonic()
            took_s = written_s - began_s


def _write(workdir: Path, stopped: threading.Event) -> str:
    """Write the report at a low priority; end at once when the run does. Return what went wrong.

    In a session of its own, so that Ctrl-C reaches the run alone, which then ends it.
    """
    command = [sys.executable, "-m", "llamajax.report", f"--workdir={workdir}"]
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
            return _problem_of(child, stopped)
    except OSError as error:
        return str(error)


def _problem_of(child: subprocess.Popen, stopped: threading.Event) -> str:
    """Wait for the process, or end it where the run ends first. Return what went wrong."""
    while not stopped.is_set():
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
