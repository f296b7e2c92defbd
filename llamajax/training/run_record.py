"""What a run enters in its record when it starts and ends: events, facts, a log with times."""

import contextlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import llamajax
from llamajax.backends import report_checkpoint
from llamajax.checkpoint import Checkpointer
from llamajax.config import RunConfig, diff, from_json_dict
from llamajax.config.saved_config import read_saved_config
from llamajax.errors import ExitCode, UserError
from llamajax.monitoring import EventLog, load_events, load_metrics
from llamajax.monitoring.blackbox import last_seen
from llamajax.monitoring.run_facts import steps_after
from llamajax.processes.host_collectives import broadcast_from_first
from llamajax.training.export import is_exported
from llamajax.training.narration import previous
from llamajax.training.safety.shutdown import Shutdown
from llamajax.training.session import Session

LOG = "train.log"
_PACKAGES = (
    "llamajax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain",
    "numpy", "ml-dtypes",
)  # fmt: skip


def process_start_s() -> float:
    """Return when this process began, on the clock of `time.monotonic`."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age_s


def is_finished(config: RunConfig, workdir: Path, step: int) -> bool:
    """Return whether a run that is at `step` has done all that its config asks for."""

    def decide() -> bool:
        exports = config.checkpoint.export_hf_every
        return _is_ended(workdir, step) and (not exports or is_exported(workdir, step))

    return step == config.train.steps and broadcast_from_first(decide)


def is_evaluated(workdir: Path, step: int) -> bool:
    """Return whether the evaluation of `step` is on record."""
    return any(row["step"] == step and "eval_loss" in row for row in load_metrics(workdir))


def _is_ended(workdir: Path, step: int) -> bool:
    last = (load_events(workdir) or [{}])[-1]
    return last.get("status") == "finished" and last["step"] == step


def removed_time(workdir: Path, step: int) -> dict[str, float]:
    """Return the seconds of the rows after `step`, which are about to be removed."""
    return steps_after(load_events(workdir), load_metrics(workdir), step)


def write_start(
    events: EventLog, workdir: Path, session: Session, *, step: int, began_s: float, anew: bool
) -> None:
    """Enter a start, and before it the death of a process that wrote no end; tell the launcher.

    anew: this start begins a record of its own.
    """
    before = [] if anew else load_events(workdir)
    if before and before[-1]["event"] != "end":
        begun = [event for event in before if event["event"] == "start"][-1:]
        seen = [*begun, before[-1], *load_metrics(workdir), last_seen(workdir)]
        events.write(
            "found_dead",
            step=max(entry["step"] for entry in seen),
            last_seen_s=max(entry.get("time_s", 0.0) for entry in seen),
            host=begun[0].get("host") if begun else None,
            pid=begun[0].get("pid") if begun else None,
        )
    report_checkpoint(step)
    machine = session.machine
    events.write(
        "start",
        step=step,
        duration_s=time.monotonic() - began_s,
        host=socket.gethostname(),
        pid=os.getpid(),
        command=sys.argv,
        versions=_versions(),
        git=_git_state(Path(llamajax.__file__).parents[1]),
        platform=machine.platform,
        device_kind=machine.device_kind,
        num_devices=machine.num_devices,
        num_processes=machine.num_processes,
        overrides=[a for a in sys.argv if a.startswith("--config.")],
        changed=_changed(workdir, session.config),
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _git_state(folder: Path) -> dict[str, Any] | None:
    """The commit of a checkout and whether files differ from it; None where it is no checkout."""
    if not (folder / ".git").exists():
        return None
    answers = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        command = ["git", "-C", str(folder), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        answers.append(done.stdout.strip())
    return {"commit": answers[0], "modified": bool(answers[1])}


def _changed(workdir: Path, config: RunConfig) -> dict[str, list[str]] | None:
    """Old and new value of each key that differs from the previous start's; None for the first."""
    try:
        before = from_json_dict(read_saved_config(workdir))
    except (ValueError, KeyError, TypeError):
        return None
    return {key: list(values) for key, values in diff(before, config).items()}


@contextlib.contextmanager
def end_written(
    events: EventLog, newest_step: Callable[[], int], shutdown: Shutdown, checkpointer: Checkpointer
) -> Iterator[dict[str, Any]]:
    """Enter the end of a run when the block is left; what the block yields is given its `code`.

    A signal that ends the process at once, before the block is left, enters the end as well.
    """
    outcome: dict[str, Any] = {}
    shutdown.name_previous(lambda: _leaving(events, newest_step(), checkpointer))
    try:
        yield outcome
    finally:
        if (error := sys.exception()) is not None:
            code = error.exit_code if isinstance(error, UserError) else ExitCode.FAILED
            outcome.update(code=code, error=f"{type(error).__name__}: {error}")
        shutdown.name_previous(lambda: previous(checkpointer))
        write_end(events, newest_step(), **outcome)
        events.close()


def write_end(events: EventLog, step: int, *, code: int, **fields: Any) -> None:
    """Enter the end of a run."""
    status = "finished" if code == ExitCode.FINISHED else "stopped"
    events.write("end", step=step, status=status, code=int(code), **fields)


def _leaving(events: EventLog, step: int, checkpointer: Checkpointer) -> str:
    """Enter that a signal ends a run at once; return the checkpoint that a rerun continues from."""
    events.write("signal", step=step)
    write_end(events, step, code=ExitCode.STOPPED)
    return previous(checkpointer)


@contextlib.contextmanager
def logged(
    workdir: Path,
    *,
    primary: bool,
    when_accepted: Callable[[Callable[[], None]], None] = lambda change: change(),
) -> Iterator[None]:
    """Copy each line of standard error, with the time, to the log of the run.

    when_accepted: makes a change to the disk, perhaps later; lines are kept until then.
    """
    if not primary:
        yield
        return
    copied, before = _Copied(sys.stderr), sys.stderr
    when_accepted(lambda: copied.begin(workdir / LOG))
    sys.stderr = copied
    try:
        yield
    finally:
        sys.stderr = before


class _Copied:
    """Write to standard error and, line by line with the time, to a file."""

    def __init__(self, stream: TextIO | None):
        self._stream, self._line = stream, ""
        self._lock = threading.Lock()
        self._kept: list[str] = []
        self._file: Path | None = None

    def begin(self, file: Path) -> None:
        """Write to `file` from now on, what was written before included."""
        with self._lock:
            self._file = file
            self._copy()

    def write(self, text: str) -> int:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with self._lock:
            # A progress bar writes over itself: only what follows its last return counts.
            found = (self._line + text).split("\n")
            *lines, self._line = (line.rpartition("\r")[2] for line in found)
            self._kept += [f"{now}  {line}\n" for line in lines]
            self._copy()
        return self._stream.write(text) if self._stream is not None else len(text)

    def _copy(self) -> None:
        if self._file is not None and self._kept:
            with contextlib.suppress(OSError), self._file.open("a", errors="replace") as file:
                file.writelines(self._kept)
            self._kept = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
