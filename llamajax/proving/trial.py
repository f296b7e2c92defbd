"""One start of a training command: to its end, or killed at a chosen moment."""

import dataclasses
import json
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llamajax.monitoring import load_metrics

_LOOK_EVERY_S = 0.001

Moment = Callable[[], bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialResult:
    """How a start ended. code: None where it was killed at the moment that was chosen."""

    code: int | None
    step: int  # the last that was logged
    checkpoint: int  # the newest complete one; 0: none


def start(
    command: Sequence[str], *, workdir: Path, log: Path, kill_at: Moment | None = None
) -> TrialResult:
    """Run `command`, which trains in `workdir` and writes to `log`.

    kill_at: asked all the time; SIGKILL when it says so. None: the command ends by itself.
    """
    poll = threading.Event()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            while kill_at is not None and process.poll() is None and not kill_at():
                poll.wait(_LOOK_EVERY_S)
            code = process.wait() if kill_at is None else process.poll()
        finally:
            process.kill()
            process.wait()
    return TrialResult(code=code, step=last_step(workdir), checkpoint=newest_checkpoint(workdir))


def at_start(log: Path, *, delay_s: float) -> Moment:
    """Some time after `train` has found out where it continues: in restore or compilation."""
    return _after(lambda: log.exists() and b"\nsteps " in log.read_bytes(), delay_s)


def at_step(workdir: Path, step: int, *, delay_s: float) -> Moment:
    """Some time after `step` was logged."""
    return _after(lambda: last_step(workdir) >= step, delay_s)


def in_save(workdir: Path, *, earliest: int) -> Moment:
    """As soon as the checkpoint of step `earliest` or of a later one is being written."""

    def begun() -> bool:
        folder = workdir / "checkpoints"
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        saving = [int(n.partition(".")[0]) for n in names if ".orbax-checkpoint-tmp" in n]
        return any(step >= earliest for step in saving)

    return begun


def _after(begun: Callable[[], bool], delay_s: float) -> Moment:
    """The moment `delay_s` after `begun`."""
    since: list[float] = []

    def moment() -> bool:
        if not since and begun():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= delay_s

    return moment


def last_step(workdir: Path) -> int:
    """The newest step of which a row was logged; 0: none."""
    return max((row["step"] for row in load_metrics(workdir)), default=0)


def newest_checkpoint(workdir: Path) -> int:
    """The step of the newest complete checkpoint; 0: none."""
    folder = workdir / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def read_meta(workdir: Path, step: int) -> dict[str, Any]:
    """What the checkpoint of `step` says of the run."""
    path = workdir / "checkpoints" / str(step) / "meta.json"
    return json.loads(path.read_text(encoding="utf-8"))
