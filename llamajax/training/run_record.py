"""What a run writes once its start is accepted, and the events of its start and end."""

import contextlib
import importlib.metadata
import json
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
from llamajax.files import write_file
from llamajax.models.machine_choices import with_loss_chunk
from llamajax.monitoring import write_run_facts
from llamajax.monitoring.run_history import History
from llamajax.training.messages import run_facts
from llamajax.training.programs import RunPrograms
from llamajax.training.resume import set_aside
from llamajax.training.run_start import Start
from llamajax.training.setup import Setup
from llamajax.training.workdir import Run, keep_tokenizer, previous_checkpoint

_PACKAGES = (
    "llamajax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain",
    "numpy", "ml-dtypes",
)  # fmt: skip


def accept_start(run: Run, start: Start, programs: RunPrograms) -> None:
    """Write what a start changes in the directory: nothing can refuse it any more.

    To be called by all processes: process 0 writes, and its failure is raised on all.
    """
    run.undo.pop_all()  # keep the folders that this start has made
    run.checkpointer.begin()
    set_aside(run, start.request)
    if run.is_primary:
        run.log.begin()
        run.events.begin()
        run.box.begin()
        file = run.workdir / "config.json"
        write_file(file, json.dumps(start.recorded["config"], indent=1) + "\n", label=f"{file}")
        keep_tokenizer(run.workdir, run.config.data.paths[0], start.recorded["tokenizer"])
        if run.config.monitoring.dump_hlo:
            (run.workdir / "profile").mkdir(exist_ok=True)
            for name in ("update", "evaluate"):
                text = getattr(programs.at(start.step + 1), name).as_text()
                write_file(run.workdir / "profile" / f"{name}.hlo.txt", text)
        write_run_facts(run.workdir, run_facts(run, start, programs))


def write_start(
    run: Run, start: Start, history: History, *, began_s: float, config_file: str | None
) -> None:
    """Write the event `start`; before it `found_dead`, if the last process wrote no end.

    began_s: of the process, `time.monotonic`. config_file: FILE.py[:ARG] as given.
    """
    machine = run.setup.machine
    if dead := history.found_dead(start.step):
        run.events.write("found_dead", **dead)
    run.events.write(
        "start",
        step=start.step,
        fork=start.fork,
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


def write_end(run: Run, step: int, *, code: int, **fields: Any) -> None:
    """Write the `end` event, with the seconds of the steps that no row will count."""
    if code != ExitCode.FINISHED and run.is_primary and run.box.newest_step:
        with contextlib.suppress(UserError, OSError):  # the disk may be what failed
            saved = max(run.checkpointer.steps(), default=0)
            fields |= History.read(run.workdir).unlogged(saved)
    status = "finished" if code == ExitCode.FINISHED else "stopped"
    run.events.write("end", step=step, status=status, code=int(code), **fields)
