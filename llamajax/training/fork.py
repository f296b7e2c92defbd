"""A run that continues from a checkpoint of another run: `train.fork=RUN@STEP`.

It continues weights, moments, steps and place in the data, with a config of its own, in a --workdir
of its own. Until that has a checkpoint, every start and every rollback begins at the other run's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamajax.checkpoint import Checkpoint, open_checkpoint
from llamajax.checkpoint.directory_owner import recorded_directory
from llamajax.checkpoint.location import Location, store_errors_explained
from llamajax.config import RunConfig, diff, from_json_dict, parse_fork
from llamajax.errors import UserError


def check_directories(config: RunConfig, workdir: Path, checkpoints: Location) -> None:
    """Raise UserError where a fork would write into the run that it continues.

    checkpoints: where the fork saves.
    """
    if config.train.fork is None:
        return
    run, _ = parse_fork(config.train.fork)
    title = f"train.fork = {config.train.fork}"
    if run.resolve() == workdir.resolve():
        raise UserError(
            f"{title}: that is this --workdir itself; choose another one, or go back in this one "
            "with train.resume_step"
        )
    if checkpoints == recorded_directory(run):
        raise UserError(
            f"{title}: that run has its checkpoints in {checkpoints}; choose another "
            "checkpoint.directory for this one"
        )


def check_same_origin(
    origin: Mapping[str, Any] | None,
    events: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Raise UserError where a run that has saved nothing yet would begin elsewhere than before.

    Its rows would be of two runs. events, rows: of the run so far.
    """
    starts = [event.get("fork") for event in events if event["event"] == "start"]
    if not starts or not rows:
        return
    before = next((fork for fork in reversed(starts) if fork), None)
    ours, theirs = (
        {key: fork[key] for key in ("run", "step", "fingerprint")} if fork else None
        for fork in (origin, before)
    )
    if ours != theirs:
        raise UserError(
            f"this --workdir began from {_words(theirs)}, and would go on from {_words(ours)}: go "
            "back to the train.fork that it had, choose another --workdir, or begin anew with "
            "--config.train.restart=true"
        )


def _words(origin: Mapping[str, Any] | None) -> str:
    if origin is None:
        return "no other run"
    return f"{origin['run']}@{origin['step']} (checkpoint {origin['fingerprint'][:12]})"


def open_fork(config: RunConfig) -> tuple[Checkpoint | None, dict[str, Any] | None]:
    """Open and verify the checkpoint that `train.fork` names; return what to record of it as well.

    The record: run, its --workdir; step; fingerprint, of the checkpoint; changed, old and new value
    of each key that differs from the config which that was trained with. (None, None) without
    `train.fork`. To be called by all processes.
    """
    if config.train.fork is None:
        return None, None
    run, step = parse_fork(config.train.fork)
    title = f"train.fork = {config.train.fork}"
    if not (run / "config.json").is_file():
        raise UserError(f"{title}: {run} is no --workdir of a run (no config.json in it)")
    if step >= config.train.steps:
        raise UserError(f"{title}: train.steps = {config.train.steps} leaves no step to train")
    directory = recorded_directory(run)
    try:
        with store_errors_explained(directory):
            checkpoint = open_checkpoint(directory / str(step))
    except UserError as error:
        raise UserError(f"{title}: {error}") from None
    checkpoint.verify()
    before = from_json_dict(checkpoint.meta["config"], source=f"the config of {checkpoint}")
    changed = diff(before, config)
    changed.pop("train.fork", None)
    return checkpoint, {
        "run": str(run.absolute()),
        "step": step,
        "fingerprint": checkpoint.manifest.fingerprint,
        "changed": {key: list(values) for key, values in changed.items()},
    }
