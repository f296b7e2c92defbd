"""One start of a training command: to its end, or killed when a condition holds."""

import contextlib
import dataclasses
import json
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llamajax.monitoring import load_metrics

_LOOK_EVERY_S = 0.001


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialResult:
    """How a start ended. code: None where it was killed."""

    code: int | None
    step: int  # the last that was logged
    checkpoint: int  # the newest complete one; 0: none


def run_trial(
    command: Sequence[str],
    *,
    workdir: Path,
    log: Path,
    kill_when: Callable[[], bool] | None = None,
    delay_s: float = 0.0,
) -> TrialResult:
    """Run `command`, which trains in `workdir`, with its output in `log`.

    kill_when: called again and again; the command gets SIGKILL `delay_s` after it returned True.
    None: the command ends by itself.
    """
    poll = threading.Event()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            if kill_when is None:
                process.wait()
            else:
                while process.poll() is None and not kill_when():
                    poll.wait(_LOOK_EVERY_S)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=delay_s)
            code = process.returncode
        finally:
            process.kill()
            process.wait()
    return TrialResult(code=code, step=last_step(workdir), checkpoint=newest_checkpoint(workdir))


def has_chosen_start(log: Path) -> bool:
    """Return whether `train` has printed where it continues; it restores and compiles then."""
    return log.exists() and b"\nsteps " in log.read_bytes()


def is_saving(workdir: Path, earliest: int) -> bool:
    """Return whether the checkpoint of step `earliest` or of a later one is being written."""
    names = [n for n in _checkpoint_names(workdir) if ".orbax-checkpoint-tmp" in n]
    return any(int(name.partition(".")[0]) >= earliest for name in names)


def last_step(workdir: Path) -> int:
    """Return the newest step of which a row was logged; 0: none."""
    return max((row["step"] for row in load_metrics(workdir)), default=0)


def newest_checkpoint(workdir: Path) -> int:
    """Return the step of the newest complete checkpoint; 0: none."""
    return max((int(n) for n in _checkpoint_names(workdir) if n.isdecimal()), default=0)


def _checkpoint_names(workdir: Path) -> list[str]:
    folder = workdir / "checkpoints"
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def read_meta(workdir: Path, step: int) -> dict[str, Any]:
    """Return what the checkpoint of `step` says of the run."""
    path = workdir / "checkpoints" / str(step) / "meta.json"
    return json.loads(path.read_text(encoding="utf-8"))
