"""What the record of a run says at a start, and the events of its start and end."""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llamajax
from llamajax.config import RunConfig, diff, from_json_dict, load
from llamajax.config.saved_config import read_saved_config
from llamajax.errors import ExitCode, UserError
from llamajax.monitoring import load_events, load_metrics
from llamajax.monitoring.blackbox import read_leftovers
from llamajax.monitoring.jsonl import is_evaluation
from llamajax.monitoring.run_facts import steps_after
from llamajax.training.messages import previous_checkpoint
from llamajax.training.setup import Setup, with_loss_chunk
from llamajax.training.workdir import Run

_PACKAGES = (
    "llamajax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain",
    "numpy", "ml-dtypes",
)  # fmt: skip


_KEPT = "kept_steps_s"


@dataclasses.dataclass(frozen=True)
class History:
    """Events and rows that earlier processes of a run, or this one, have left in its directory."""

    workdir: Path
    events: list[dict[str, Any]]
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, workdir: Path) -> "History":
        """Read the events and rows that are on disk now."""
        return cls(workdir, load_events(workdir), load_metrics(workdir))

    def is_finished(self, step: int) -> bool:
        """Whether the last event says that the run finished at `step`."""
        last = self.events[-1] if self.events else {}
        return last.get("status") == "finished" and last["step"] == step

    def is_evaluated(self, step: int) -> bool:
        """Whether the evaluation of `step` is on record."""
        return any(row["step"] == step and is_evaluation(row) for row in self.rows)

    def time_after(self, step: int) -> dict[str, float]:
        """Return the seconds of the rows after `step`, which a start from there removes."""
        return steps_after(self.events, self.rows, step)

    def found_dead(self, step: int) -> dict[str, Any] | None:
        """Describe the last process if it wrote no end, for a start from `step`."""
        if not self.events or self.events[-1]["event"] == "end":
            return None
        begun = [event for event in self.events if event["event"] == "start"][-1:]
        box, box_s = read_leftovers(self.workdir)
        box = _after_rollback(box)
        seen = [*begun, self.events[-1], *self.rows, *box]
        return {
            "step": max(entry["step"] for entry in seen),
            "last_seen_s": max([box_s, *(entry.get("time_s", 0.0) for entry in seen)]),
            "host": begun[0].get("host") if begun else None,
            "pid": begun[0].get("pid") if begun else None,
        } | self.unlogged(step)

    def unlogged(self, step: int) -> dict[str, float]:
        """Return the seconds of a process's steps since its last row, from its black box.

        kept_*: of steps up to `step`, where the next start begins. removed_*: of later ones, which
        are done again.
        """
        box = _after_rollback(read_leftovers(self.workdir)[0])
        begun = max((i for i, e in enumerate(self.events) if e["event"] == "start"), default=0)
        counted = [row for row in self.rows if "step_time_s" in row]
        # A stop signal has the sums of the steps up to it in its event.
        counted += [e for e in self.events[begun:] if e["event"] == "signal" and _KEPT in e]
        logged = max((entry["step"] for entry in counted), default=0)
        parts = ("steps_s", "data_wait_s", "tokens")
        kept = total = dict.fromkeys(parts, 0)
        for row in box:  # each has the sums over all steps since the last row
            if row["step"] > logged and "unlogged_steps_s" in row:
                total = {part: row[f"unlogged_{part}"] for part in parts}
                kept = total if row["step"] <= step else kept
        removed = {f"removed_{part}": total[part] - kept[part] for part in parts[:2]}
        return {f"kept_{part}": value for part, value in kept.items()} | removed


def _after_rollback(box: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a black box that are not before its last rollback."""
    for i in range(1, len(box)):
        if box[-i]["step"] <= box[-i - 1]["step"]:
            return box[-i:]
    return box


def process_start_s() -> float:
    """Return when this process began, on the clock of `time.monotonic`."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age_s


def write_start(
    run: Run,
    *,
    step: int,
    fork: dict[str, Any] | None,
    began_s: float,
    config_file: str | None,
) -> None:
    """Write the `start` event.

    step: that the run continues from. fork: as Start. began_s: of the process, `time.monotonic`.
    """
    machine = run.setup.machine
    run.events.write(
        "start",
        step=step,
        fork=fork,
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
        overrides=_overrides(config_file, run.setup) if config_file else {},
        changed=_changed(run.workdir, run.config),
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of a checkout and whether files differ from it; None for no checkout."""
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


def _overrides(config_file: str, setup: Setup) -> dict[str, list[str | None]]:
    """Return the file's value and the one used of each key in which they differ.

    Keys that the file leaves to the platform are left out.

    A file that is no whole config without the command line has no values to show: null.
    """
    try:
        file = with_loss_chunk(load(config_file), setup.machine.platform, setup.mesh.shape)
        return {key: list(values) for key, values in diff(file, setup.config).items()}
    except UserError:
        given = (
            text.removeprefix("--config.") for text in sys.argv if text.startswith("--config.")
        )
        return {key: [None, value] for key, _, value in (text.partition("=") for text in given)}


def _changed(workdir: Path, config: RunConfig) -> dict[str, list[str]] | None:
    """Return old and new value of each key that differs from the previous start's, if any."""
    try:
        before = from_json_dict(read_saved_config(workdir))
    except (UserError, KeyError, TypeError):  # none, or one of another version
        return None
    return {key: list(values) for key, values in diff(before, config).items()}


@contextlib.contextmanager
def end_event(run: Run, start_step: int) -> Iterator[dict[str, Any]]:
    """Write the `end` event when the block is left; give what the block yields its `code`.

    A signal that ends the process at once, before the block is left, writes it as well.
    """
    outcome: dict[str, Any] = {}

    def newest_step() -> int:
        return max(start_step, run.box.newest_step)

    def before_exit() -> str:
        run.events.write("signal", step=newest_step(), signal=run.shutdown.signal)
        write_end(run, newest_step(), code=ExitCode.STOPPED)
        return previous_checkpoint(run.checkpointer)

    run.shutdown.call_before_exit(before_exit)
    try:
        yield outcome
    finally:
        if (error := sys.exception()) is not None:
            code = error.exit_code if isinstance(error, UserError) else ExitCode.FAILED
            outcome.update(code=code, error=f"{type(error).__name__}: {error}")
        run.shutdown.call_before_exit(lambda: previous_checkpoint(run.checkpointer))
        write_end(run, newest_step(), **outcome)
        run.events.close()


def _unlogged_steps(run: Run) -> dict[str, float]:
    """Return the seconds of the steps that no row will count."""
    with contextlib.suppress(UserError, OSError):  # the disk may be what failed
        if run.is_primary and run.box.newest_step:
            return History.read(run.workdir).unlogged(max(run.checkpointer.steps(), default=0))
    return {}


def write_end(run: Run, step: int, *, code: int, **fields: Any) -> None:
    """Write the `end` event, with the seconds of the steps since the last row."""
    if code != ExitCode.FINISHED:
        fields |= _unlogged_steps(run)
    status = "finished" if code == ExitCode.FINISHED else "stopped"
    run.events.write("end", step=step, status=status, code=int(code), **fields)
