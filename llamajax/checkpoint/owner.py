"""Whose checkpoints a directory outside of any --workdir holds: one run's, named in `owner.json`.

A lock as in a --workdir does not exist in an object store. What is kept instead: the first run
writes its name, another one is refused, and a run looks before each save whether the name is still
its own. Two runs that start at one moment from equal paths on two hosts are told apart at their
first saves only.
"""

import contextlib
import json
import socket
import uuid
from pathlib import Path

import jax

from llamajax.checkpoint.directory import undo_folders
from llamajax.checkpoint.room import reason
from llamajax.checkpoint.storage import (
    Place,
    create,
    error_type,
    failures,
    how_to_mend,
    is_remote,
    names,
    place,
)
from llamajax.errors import UserError
from llamajax.processes.agreement import raise_together

OWNER = "owner.json"
_RUN_ID = ".run_id"


def checkpoints_of(workdir: Path, directory: str | None) -> Place:
    """Where a run keeps its checkpoints. directory: `checkpoint.directory` of its config."""
    return workdir.absolute() / "checkpoints" if directory is None else place(directory)


def recorded(workdir: Path) -> Place:
    """Where the run in a --workdir keeps its checkpoints, by the config that it left there."""
    try:
        config = json.loads((workdir / "config.json").read_text("utf-8"))
        return checkpoints_of(workdir, config["checkpoint"]["directory"])
    except (OSError, ValueError, KeyError, TypeError):
        return checkpoints_of(workdir, None)  # no run of ours, or one before there was a choice


def claim(directory: Place, workdir: Path, undo: contextlib.ExitStack | None = None) -> str | None:
    """Make `directory` that of the run in `workdir`; what to say of it, if anything.

    undo: given what undoes this, for a start that is refused later.
    Raises UserError on all processes where it is another run's, or where a process cannot use it.
    To be called by all, before anything is written or removed there.
    """
    if directory == checkpoints_of(workdir, None):
        return None
    words = problem = None
    undo = undo or contextlib.ExitStack()
    try:
        if jax.process_index() == 0:
            if not is_remote(directory):
                undo_folders(directory, undo)
                directory.mkdir(parents=True, exist_ok=True)
            words = _claimed(directory, workdir, undo)
        else:
            names(directory)
    except UserError as error:
        problem = error
    except failures(directory) as error:
        gone = is_remote(directory) and isinstance(error, FileNotFoundError)
        why = "there is no such bucket" if gone else reason(error)
        fix = how_to_mend(directory) if is_remote(directory) else "choose another"
        kind = error_type(error, directory)
        problem = kind(f"checkpoint.directory = {directory} cannot be used: {why}; {fix}")
    raise_together(problem)
    return words


def check_owner(directory: Place, workdir: Path) -> None:
    """OSError where another run has taken `directory` over."""
    owner = _read(directory)
    if owner is None or owner.get("id") != _run_id(workdir):
        raise OSError(0, f"{directory} was taken over by {_said(owner)}; stop one of the two")


def _claimed(directory: Place, workdir: Path, undo: contextlib.ExitStack) -> str | None:
    if not (workdir / _RUN_ID).exists():
        undo.callback((workdir / _RUN_ID).unlink, missing_ok=True)
    me = {"id": _run_id(workdir), "workdir": str(workdir.absolute()), "host": socket.gethostname()}
    text = json.dumps(me)
    if create(directory / OWNER, text):
        undo.callback((directory / OWNER).unlink)
        return None
    owner = _read(directory)
    if owner is not None and owner.get("id") == me["id"]:
        return None
    if owner is None or owner.get("workdir") != me["workdir"]:
        raise UserError(
            f"checkpoint.directory = {directory} is of {_said(owner)}; name another directory, or "
            f"continue that run. If it is gone for good, delete {directory / OWNER}"
        )
    undo.callback((directory / OWNER).write_text, json.dumps(owner))
    (directory / OWNER).write_text(text)
    return f"{directory} is taken over from {_said(owner)}: this --workdir is new"


def _read(directory: Place) -> dict[str, str] | None:
    try:
        found = json.loads((directory / OWNER).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _said(owner: dict[str, str] | None) -> str:
    if owner is None:
        return "nobody known"
    return f"the run in {owner.get('workdir')} on {owner.get('host')}"


def _run_id(workdir: Path) -> str:
    """What tells this --workdir from every other one."""
    file = workdir / _RUN_ID
    if not file.exists():
        file.write_text(uuid.uuid4().hex, "utf-8")
    return file.read_text("utf-8")
