"""Which checkpoint a start continues from: the newest, an older one that is asked for, or none.

Or another run's (`train.fork=RUN@STEP`): its weights, moments, steps and place in the data go on,
with a config and a --workdir of their own. Until that has a checkpoint, every start and every
rollback begins at the other run's.

Steps that were saved are never done again without a word: the record of the run says what was
saved, and a start that finds none of it is refused.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from llamajax.checkpoint import Checkpoint, open_checkpoint
from llamajax.checkpoint import manifest as manifests
from llamajax.checkpoint.directory_owner import checkpoint_directory, recorded_directory
from llamajax.checkpoint.location import (
    Location,
    is_remote,
    reason,
    store_errors_explained,
)
from llamajax.config import diff, from_json_dict, parse_fork
from llamajax.config.saved_config import read_saved_config
from llamajax.errors import UserError, say
from llamajax.files import free_name
from llamajax.monitoring.run_history import History
from llamajax.processes.host_collectives import broadcast_from_first
from llamajax.training.safety.rollback_log import AUDIT
from llamajax.training.workdir import Run

# rollback: within a run. The others: where the config asks to continue.
Request = Literal["newest", "restart", "older", "rollback"]
# What a run writes in its --workdir, besides checkpoints and logs.
_RECORD = ("metrics.jsonl", "events.jsonl", AUDIT, "run.json", "config.json", "tokenizer")
_RECORD += ("norms.jsonl", "samples.jsonl", "tensorboard", "wandb", "blackbox", "hf", "peft")
_RECORD += ("report.html",)
_ASIDE = "before_restart"


def requested_start(run: Run, history: History) -> Request:
    """Return where the config asks to continue. To be called by all processes.

    `train.restart` and `train.resume_step` count once: the same command again continues from the
    newest checkpoint. Raises UserError where checkpoints were saved and all of them have gone.
    """
    train, checkpoints = run.config.train, run.checkpointer.directory

    def decide() -> Request:
        with store_errors_explained(checkpoints):
            before = read_saved_config(run.workdir).get("train", {})
            if train.restart and not before.get("restart"):
                if is_remote(checkpoints) and manifests.step_directories(checkpoints):
                    raise UserError(
                        f"train.restart: {checkpoints} is in an object store, where nothing can be "
                        "renamed; choose another checkpoint.directory to begin anew"
                    )
                return "restart"
            if train.resume_step not in (None, before.get("resume_step")):
                return "older"
            _check_not_gone(history, checkpoints)
            return "newest"

    return broadcast_from_first(decide)


def choose_checkpoint(run: Run, request: Request, history: History) -> Checkpoint | None:
    """Return the verified checkpoint of the run to continue from, and say what it costs.

    To be called by all processes.
    """
    checkpoints = run.checkpointer.directory
    if request == "restart":
        return None
    if request == "older":
        with store_errors_explained(checkpoints):
            checkpoint = open_checkpoint(checkpoints / str(run.config.train.resume_step))
        checkpoint.verify()
        return checkpoint
    checkpoint, words = run.checkpointer.newest_intact()
    for line in words:
        run.say(line)
    if words or request == "rollback":
        return checkpoint
    step = 0 if checkpoint is None else checkpoint.step
    saved = newest_save(history)
    if saved is not None and saved > step:
        run.say(
            f"warning: the checkpoint of step {saved} was saved and is not in "
            f"{checkpoints} any more: steps {step + 1} to {saved} are done again"
        )
    elif checkpoint is None and history.rows:
        last = history.rows[-1]["step"]
        run.say(f"no checkpoint was saved before: all steps to {last} are done again")
    return checkpoint


def set_aside(run: Run, request: Request) -> None:
    """Move what does not belong to the run any more out of its way, and say so.

    To be called by all processes, once the start is accepted; process 0 does it.
    """
    checkpoints = run.checkpointer.directory

    def move() -> None:
        try:
            if request == "restart":
                say(_set_aside_all(run.workdir, checkpoints))
            else:
                say(_set_aside_later(run.workdir, checkpoints, run.config.train.resume_step))
        except OSError as error:
            raise UserError(f"what was there before cannot be set aside: {reason(error)}") from None

    if request in ("restart", "older"):
        broadcast_from_first(move)


def newest_save(history: History) -> int | None:
    """Return the step of the newest save that the record of a run names, None where there is none.

    A start or a rollback that went back to an earlier step supersedes the saves after it.
    """
    newest: int | None = None
    fork_step = 0  # of another run's checkpoint, which this one began with
    for event in history.events:
        kind = event["event"]
        if kind == "save" and not event.get("error"):
            newest = event["step"]
        elif kind == "start":
            fork_step = (event.get("fork") or {}).get("step", fork_step)
            newest = event["step"] if event["step"] > fork_step else None
        elif kind == "rollback":
            back = min(newest or 0, event.get("to_step", 0))
            newest = back if back > fork_step else None
    return newest


def _check_not_gone(history: History, checkpoints: Location) -> None:
    saved = newest_save(history)
    if saved is None or manifests.step_directories(checkpoints):
        return
    before = recorded_directory(history.workdir)
    where = "" if before == checkpoints else f" It was saved in {before}: see checkpoint.directory."
    raise UserError(
        f"--workdir={history.workdir}: the checkpoint of step {saved} was saved, and there is none "
        f"in {checkpoints}.{where} Bring the checkpoints back (is the disk mounted?), or begin "
        "anew with --config.train.restart=true, which sets the old rows aside"
    )


def _set_aside_all(workdir: Path, checkpoints: Location) -> str:
    """Move the record and the checkpoints of a run into a directory of their own."""
    # The record last: it says that there are checkpoints.
    names = [name for name in ("checkpoints", *_RECORD) if os.path.lexists(workdir / name)]
    elsewhere = checkpoints != checkpoint_directory(workdir, None) and not is_remote(checkpoints)
    steps = manifests.step_directories(checkpoints) if elsewhere else []
    if not names and not steps:
        return "train.restart: there was nothing to set aside"
    target, words = free_name(workdir / _ASIDE), ""
    target.mkdir()
    if steps:
        kept = free_name(checkpoints / _ASIDE)
        kept.mkdir()
        for path in steps:
            path.rename(kept / path.name)
        words = f", its checkpoints in {kept}"
    for name in names:
        (workdir / name).rename(target / name)
    return f"train.restart: what was there before is in {target}{words}"


def _set_aside_later(workdir: Path, checkpoints: Location, step: int) -> str:
    """Rename the checkpoints after `step`, and keep a copy of the rows."""
    metrics = workdir / "metrics.jsonl"
    if metrics.exists():
        shutil.copy2(metrics, free_name(metrics.with_name("metrics.set_aside.jsonl")))
    with store_errors_explained(checkpoints):
        later = [p for p in manifests.step_directories(checkpoints) if int(p.name) > step]
        for path in later:
            manifests.set_aside(path, "set_aside")
    return (
        f"train.resume_step: going on from step {step}; later checkpoints are set aside: "
        f"{', '.join(path.name for path in later) or 'none'}"
    )


def check_fork(run: Run) -> None:
    """Raise UserError where a fork would write into the run that it continues."""
    if (fork := run.config.train.fork) is None:
        return
    other, _ = parse_fork(fork)
    theirs = recorded_directory(other)
    if other.resolve() == run.workdir.resolve() or theirs == run.checkpointer.directory:
        raise UserError(
            f"train.fork = {fork}: that run is in {other} and has its checkpoints in {theirs}; "
            "choose another --workdir and checkpoint.directory for this one, or go back in that "
            "run with train.resume_step"
        )


def open_fork(run: Run, history: History) -> tuple[Checkpoint | None, dict[str, Any] | None]:
    """Open and verify the checkpoint that `train.fork` names; return what to record of it as well.

    The record: run, its --workdir; step; fingerprint, of the checkpoint; changed, old and new value
    of each key that differs from the config which that was trained with. (None, None) without
    `train.fork`. UserError where the run, which has no checkpoint, began elsewhere before. To be
    called by all processes.
    """
    config, checkpoint, origin = run.config, None, None
    if config.train.fork is not None:
        other, step = parse_fork(config.train.fork)
        title = f"train.fork = {config.train.fork}"
        if not (other / "config.json").is_file():
            raise UserError(f"{title}: {other} is no --workdir of a run (no config.json in it)")
        if step >= config.train.steps:
            raise UserError(f"{title}: train.steps = {config.train.steps} leaves no step to train")
        directory = recorded_directory(other)
        try:
            with store_errors_explained(directory):
                checkpoint = open_checkpoint(directory / str(step))
        except UserError as error:
            raise UserError(f"{title}: {error}") from None
        checkpoint.verify()
        before = from_json_dict(checkpoint.meta["config"], source=f"the config of {checkpoint}")
        changed = diff(before, config)
        changed.pop("train.fork", None)
        origin = {
            "run": str(other.absolute()),
            "step": step,
            "fingerprint": checkpoint.manifest.fingerprint,
            "changed": {key: list(values) for key, values in changed.items()},
        }
    _check_same_origin(origin, history)
    if origin:
        run.say(f"forked from {checkpoint}")
    return checkpoint, origin


def _check_same_origin(origin: Mapping[str, Any] | None, history: History) -> None:
    """Raise UserError where a run that has saved nothing yet would begin elsewhere than before.

    Its rows would be of two runs.
    """
    starts = [event.get("fork") for event in history.events if event["event"] == "start"]
    if not starts or not history.rows:
        return
    ours, theirs = _words(origin), _words(next(filter(None, reversed(starts)), None))
    if ours != theirs:
        raise UserError(
            f"this --workdir began from {theirs}, and would go on from {ours}: go back to the "
            "train.fork that it had, choose another --workdir, or begin anew with "
            "--config.train.restart=true"
        )


def _words(origin: Mapping[str, Any] | None) -> str:
    if origin is None:
        return "no other run"
    return f"{origin['run']}@{origin['step']} (checkpoint {origin['fingerprint'][:12]})"
