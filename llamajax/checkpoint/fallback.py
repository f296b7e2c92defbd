"""Where a run continues when its newest checkpoint is damaged: at the newest that is whole.

Only the run itself goes back like this, since going back costs steps and not truth: they are done
again. Whoever reads a run's weights is refused instead (`restore.newest_checkpoint`).
"""

import functools
import os
from collections.abc import Callable, Collection
from pathlib import Path

import jax

from llamajax.checkpoint import manifest as manifests
from llamajax.checkpoint.restore import Checkpoint, damaged, open_verified
from llamajax.checkpoint.storage import Place, failures, is_remote
from llamajax.errors import UserError
from llamajax.processes.agreement import agree, told

_SIGN = "!" * 12


def newest_whole(
    directory: Place,
    *,
    without: Collection[int] = (),
    when_accepted: Callable[[Callable[[], None]], None] = lambda change: change(),
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose every file is whole, verified, and what to say loudly.

    None where there is no checkpoint at all. Every file is read, each by one process. Damaged ones
    that are newer are set aside as `STEP.damaged` (in an object store: marked, and kept until that
    step is saved again), so that their steps can be saved again; the words are empty when there
    were none. without: steps that do not count. when_accepted: renames, perhaps later. UserError
    when all are damaged: then nothing is renamed.
    To be called by all processes, which get the same answer whoever of them saw the damage.
    """
    found: list[tuple[Place, str]] = []
    steps = [int(path.name) for path in manifests.step_directories(directory)]
    steps = [step for step in steps if step not in without]
    step = told(steps.pop() if steps else None)
    while step is not None:
        path = directory / str(step)
        checkpoint, problem = open_verified(path)
        if checkpoint is not None:
            if found:
                when_accepted(functools.partial(_set_aside, found))
            return checkpoint, _words(found, step)
        found.append((path, problem))
        older = [number for number in steps if number < step]
        step = told(older[-1] if older else None)
    if found:
        raise damaged(*found[0], hopeless=True)
    return None, []


def _set_aside(found: list[tuple[Place, str]]) -> None:
    """Rename damaged checkpoints; process 0 does it."""
    problem = None
    for path, what in found:
        remote = is_remote(path)
        try:
            if jax.process_index() == 0 and remote:
                manifests.set_aside(path)
            elif jax.process_index() == 0:
                path.rename(_name_aside(path))
        except failures(path) as error:
            why = error if remote else error.strerror
            problem = f"{path} is damaged ({what}) and cannot be renamed: {why}"
    if problem := agree(problem):
        raise UserError(problem)


def _words(found: list[tuple[Place, str]], step: int) -> list[str]:
    """What to say of damaged checkpoints, newest first, and of the one to continue from."""
    if not found:
        return []
    words = []
    for path, what in found:
        kept = (
            f"marked by {manifests.ASIDE}, and kept until its step is saved again"
            if is_remote(path)
            else f"kept aside as {_name_aside(path).name}"
        )
        words.append(f"{_SIGN} checkpoint {path} is damaged: {what}; {kept}")
    last = int(found[0][0].name)
    again = f"step {last} is" if last == step + 1 else f"steps {step + 1} to {last} are"
    where = found[0][0].with_name(str(step))
    words.append(f"{_SIGN} falling back to {where}, the newest that is whole: {again} done again")
    return words


def _name_aside(path: Path) -> Path:
    return free_name(path.with_name(f"{path.name}.damaged"))


def free_name(path: Path) -> Path:
    """Return `path`, or the first of `path.2`, `path.3`, ... that is not there."""
    names = (path.name, *(f"{path.name}.{n}" for n in range(2, 1000)))
    return next(path.with_name(name) for name in names if not os.path.lexists(path.parent / name))
