"""A run that goes on from a checkpoint of another run: `train.fork=RUN@STEP`.

It continues weights, moments, steps and place in the data, with a config of its own, in a --workdir
of its own. Until that has a checkpoint, every start and every rollback begins at the other run's.
"""

from pathlib import Path
from typing import Any

from llamajax.checkpoint import Checkpoint, open_checkpoint
from llamajax.checkpoint.directory_owner import recorded_directory
from llamajax.checkpoint.location import store_errors_explained
from llamajax.config import RunConfig, diff, from_json_dict, parse_fork
from llamajax.errors import UserError


def open_fork(config: RunConfig, workdir: Path) -> Checkpoint:
    """Open and verify the checkpoint that `train.fork` names. To be called by all processes."""
    run, step = parse_fork(config.train.fork)
    title = f"train.fork = {config.train.fork}"
    if not run.is_dir():
        raise UserError(f"{title}: there is no directory {run}; name the --workdir of a run")
    if run.resolve() == workdir.resolve():
        raise UserError(f"{title}: that is this --workdir; train.resume_step goes back in it")
    if step >= config.train.steps:
        raise UserError(f"{title}: train.steps = {config.train.steps} leaves no step to train")
    directory = recorded_directory(run)
    try:
        with store_errors_explained(directory):
            checkpoint = open_checkpoint(directory / str(step))
    except UserError as error:
        raise UserError(f"{title}: {error}") from None
    checkpoint.verify()
    return checkpoint


def origin_record(checkpoint: Checkpoint, config: RunConfig) -> dict[str, Any]:
    """Return what a fork records of where it comes from.

    run: its --workdir. fingerprint: of the checkpoint. changed: old and new value of each key that
    differs from the config which that was trained with.
    """
    before = from_json_dict(checkpoint.meta["config"], source=f"the config of {checkpoint}")
    changed = diff(before, config)
    changed.pop("train.fork", None)
    return {
        "run": str(parse_fork(config.train.fork)[0].absolute()),
        "step": checkpoint.step,
        "fingerprint": checkpoint.manifest.fingerprint,
        "changed": {key: list(values) for key, values in changed.items()},
    }
