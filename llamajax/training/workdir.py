"""The directory of a run: its lock, its resolved config, and what it says on the terminal."""

import contextlib
import functools
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax

from llamajax import data, errors
from llamajax.backends import report_checkpoint
from llamajax.checkpoint import Checkpointer
from llamajax.checkpoint.directory_owner import check_owner, checkpoint_directory, claim
from llamajax.checkpoint.location import check_usable, is_remote
from llamajax.config import RunConfig, to_json_dict
from llamajax.errors import TransientError, UserError
from llamajax.files import lock_file, replaced_directory, write_file
from llamajax.formats.weights import TOKENIZER
from llamajax.processes.host_collectives import broadcast_from_first, raise_together
from llamajax.training.acceptance import Acceptance
from llamajax.training.session import Session

# Network file systems show a new file to other hosts only after their caches' time.
_SHARED_WITHIN_S = 30


def say(text: str, *, primary: bool = True) -> None:
    """One line on stderr, from process 0 only."""
    if primary:
        errors.say(text)


@contextlib.contextmanager
def opened(workdir: Path, *, process_id: int, undo: contextlib.ExitStack) -> Iterator[bool]:
    """Make `workdir` if needed and lock it against a second run; whether it could be locked.

    undo: given what removes the lock's file, if that is new; closed before the lock is released.
    """
    file = workdir / f".lock_{process_id}"
    is_new = not file.exists()
    try:
        lock, no_lock = _locked(file)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: {error.strerror}; choose a directory that can be written"
        ) from None
    if no_lock:
        say(
            f"warning: --workdir={workdir} cannot be locked ({no_lock}): nothing keeps a second "
            "run out of it",
            primary=process_id == 0,
        )
    with lock:
        if is_new:
            undo.callback(file.unlink, missing_ok=True)
        try:
            yield not no_lock
        finally:
            undo.close()


def _locked(file: Path) -> tuple[IO[str], str | None]:
    """The locked file, and why it could not be locked, if the file system has no locks."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a")
        try:
            no_lock = lock_file(lock)
        except BlockingIOError:
            lock.close()
            raise TransientError(
                f"--workdir={file.parent}: another run is using it; stop that one or choose another"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                return lock, no_lock
        lock.close()  # a start that was refused has removed this file: lock the new one


def check_shared(directory: Path, *, key: str) -> None:
    """UserError on all processes unless all see the same directory. To be called by all.

    Process 0 leaves a random token in it, which every other one must find there.
    """
    if jax.process_count() == 1:
        return

    def leave_token() -> str:
        name = f".shared_{os.urandom(8).hex()}"
        (directory / name).touch()
        return name

    file, problem = directory / broadcast_from_first(leave_token), None
    deadline = time.monotonic() + _SHARED_WITHIN_S
    while not (found := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if not found:
        problem = UserError(
            f"{key}={directory} on {socket.gethostname()} (process {jax.process_index()}) is "
            "not the directory of process 0: checkpoints need storage that all nodes share"
        )
    try:
        raise_together(problem)
    finally:
        if jax.process_index() == 0:
            file.unlink(missing_ok=True)


def open_checkpoints(session: Session, workdir: Path, acceptance: Acceptance) -> Checkpointer:
    """Claim the directory of the run's checkpoints and open it. To be called by all processes."""
    c = session.config.checkpoint
    directory = checkpoint_directory(workdir, c.directory)
    check_usable(directory)
    if words := claim(directory, workdir, acceptance.undo):
        say(words, primary=session.machine.is_primary)
    if not is_remote(directory) and workdir.absolute() not in directory.parents:
        check_shared(directory, key="checkpoint.directory")
    mine = functools.partial(check_owner, directory, workdir)
    return Checkpointer(
        directory,
        keep=c.keep,
        keep_every=c.keep_every,
        asynchronous=c.asynchronous and session.machine.saves_asynchronously,
        check_owner=mine if c.directory is not None else None,
        on_complete=report_checkpoint,
        when_accepted=acceptance.when_accepted,
    )


def write_config(workdir: Path, config: RunConfig) -> None:
    """Write the resolved config to `config.json`, atomically."""
    path = workdir / "config.json"
    write_file(path, json.dumps(to_json_dict(config), indent=1) + "\n", label=str(path))


def keep_tokenizer(workdir: Path, config: RunConfig, record: Mapping[str, Any]) -> None:
    """Copy the tokenizer of the data, so that the workdir is complete wherever it is taken.

    record: of the run's tokenizer; one that is already kept stays.
    """
    target = workdir / TOKENIZER
    if target.is_dir() and data.load_tokenizer(target).fingerprint == record["fingerprint"]:
        return
    tokenizer = data.load_tokenizer(config.data.path.split(",")[0].strip())
    with replaced_directory(target) as hidden:
        tokenizer.save(hidden)
