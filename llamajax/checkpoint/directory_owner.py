"""Record in `owner.json` which run a checkpoint directory outside its --workdir belongs to.

An object store has no lock like the one in a --workdir. Instead the first run writes its name, a
second run is refused, and a run checks before each save that the name is still its own. Two runs
that start at the same moment from equal paths on two hosts are noticed at their first saves.
"""

import contextlib
import json
import socket
import uuid
from pathlib import Path

import jax

from llamajax.checkpoint import location
from llamajax.checkpoint.location import Location
from llamajax.config.saved_config import read_saved_config
from llamajax.errors import UserError
from llamajax.files import undo_new_folders
from llamajax.processes.host_collectives import raise_together

OWNER = "owner.json"
_RUN_ID = ".run_id"


def checkpoint_directory(workdir: Path, directory: str | None) -> Location:
    """Return where a run saves. directory: `checkpoint.directory` of its config."""
    return location.locate(workdir / "checkpoints" if directory is None else directory)


def recorded_directory(workdir: Path) -> Location:
    """Return where the run in a --workdir saved, by the config that it left there."""
    try:
        return checkpoint_directory(workdir, read_saved_config(workdir)["checkpoint"]["directory"])
    except (ValueError, KeyError, TypeError):  # no run, or one older than the key
        return checkpoint_directory(workdir, None)


def claim(
    directory: Location, workdir: Path, undo: contextlib.ExitStack | None = None
) -> str | None:
    """Make `directory` belong to the run in `workdir`; return what to tell the user, if anything.

    undo: receives what reverts the claim, for a start that is refused later. Raises UserError on
    all processes if the directory is another run's, or if one process cannot use it. To be called
    by all processes, before anything is written or removed there.
    """
    if directory == checkpoint_directory(workdir, None):
        return None
    words = problem = None
    undo = undo or contextlib.ExitStack()
    try:
        if jax.process_index() == 0:
            if not location.is_remote(directory):
                undo_new_folders(directory, undo)
                directory.mkdir(parents=True, exist_ok=True)
            words = _write_claim(directory, workdir, undo)
        else:
            location.entry_names(directory)
    except UserError as error:
        problem = error
    except OSError as error:
        what = f"checkpoint.directory = {directory} cannot be used"
        problem = location.refusal(error, directory, what, "choose another")
    raise_together(problem)
    return words


def check_unclaimed(directory: Location, workdir: Path) -> None:
    """Raise UserError where `claim` would, because the directory is another run's. Only reads."""
    with location.store_errors_explained(directory):
        owner, name = _read_owner(directory), workdir / _RUN_ID
    is_mine = owner is None or (name.exists() and owner.get("id") == name.read_text("utf-8"))
    if not is_mine and owner.get("workdir") != str(location.locate(workdir)):
        raise _refused(directory, owner)


def check_owner(directory: Location, workdir: Path) -> None:
    """Raise OSError if another run has taken `directory` over."""
    owner = _read_owner(directory)
    if owner is None:
        raise OSError(0, f"{directory / OWNER} is gone; was the bucket or folder deleted?")
    if owner.get("id") != _run_id(workdir):
        raise OSError(0, f"{directory} was taken over by {_describe(owner)}; stop one of the two")


def _write_claim(directory: Location, workdir: Path, undo: contextlib.ExitStack) -> str | None:
    if not (workdir / _RUN_ID).exists():
        undo.callback((workdir / _RUN_ID).unlink, missing_ok=True)
    me = {
        "id": _run_id(workdir),
        "workdir": str(location.locate(workdir)),
        "host": socket.gethostname(),
    }
    text = json.dumps(me)
    if location.create_file(directory / OWNER, text):
        undo.callback((directory / OWNER).unlink)
        return None
    owner = _read_owner(directory)
    if owner is not None and owner.get("id") == me["id"]:
        return None
    if owner is None or owner.get("workdir") != me["workdir"]:
        raise _refused(directory, owner)
    undo.callback((directory / OWNER).write_text, json.dumps(owner))
    (directory / OWNER).write_text(text)
    return f"{directory} is taken over from {_describe(owner)}: this --workdir is new"


def _refused(directory: Location, owner: dict[str, str] | None) -> UserError:
    return UserError(
        f"checkpoint.directory = {directory} is of {_describe(owner)}; name another directory, "
        f"or continue that run. If it is gone for good, delete {directory / OWNER}"
    )


def _read_owner(directory: Location) -> dict[str, str] | None:
    try:
        found = json.loads((directory / OWNER).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _describe(owner: dict[str, str] | None) -> str:
    if owner is None:
        return "nobody known"
    return f"the run in {owner.get('workdir')} on {owner.get('host')}"


def _run_id(workdir: Path) -> str:
    """Return the random name of this --workdir; write it if there is none."""
    file = workdir / _RUN_ID
    if not file.exists():
        file.write_text(uuid.uuid4().hex, "utf-8")
    return file.read_text("utf-8")
