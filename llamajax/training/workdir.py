"""The directory of a run: locked, opened, and changed only once its start is accepted."""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from llamajax import data
from llamajax.backends import report_checkpoint
from llamajax.checkpoint import Checkpointer
from llamajax.checkpoint.directory_owner import (
    check_owner,
    check_unclaimed,
    checkpoint_directory,
    claim,
)
from llamajax.checkpoint.location import check_usable, is_remote, locate
from llamajax.config import RunConfig
from llamajax.errors import TransientError, UserError, say
from llamajax.files import lock_file, replaced_directory
from llamajax.formats.weights import TOKENIZER
from llamajax.monitoring import EventLog
from llamajax.monitoring.blackbox import BlackBox
from llamajax.monitoring.events import LOCK
from llamajax.monitoring.log_copy import LogCopy
from llamajax.processes.host_collectives import check_shared_directory
from llamajax.training.safety.rollback_log import RollbackLog
from llamajax.training.safety.shutdown import Shutdown, exit_on_error
from llamajax.training.setup import Setup

LOG = "train.log"


class Run:
    """What a run has from its start to its end, however often it is rolled back.

    log, events, box and checkpointer change nothing on the disk before `begin`. is_locked: against
    a second run. undo: removes what a start has to make before it is accepted (folders, lock,
    claim); closed when it is refused.
    """

    def __init__(
        self,
        setup: Setup,
        workdir: Path,
        checkpointer: Checkpointer,
        *,
        is_locked: bool,
        shutdown: Shutdown,
        undo: contextlib.ExitStack,
    ):
        primary, box_steps = setup.machine.is_primary, setup.config.guard.blackbox_steps
        self.setup, self.workdir, self.checkpointer = setup, workdir, checkpointer
        self.is_locked, self.shutdown, self.undo = is_locked, shutdown, undo
        self.rollbacks = RollbackLog(workdir, primary=primary)
        self.log = LogCopy(workdir / LOG)
        self.events = EventLog(workdir, primary=primary)
        self.box = BlackBox(workdir, steps=box_steps, primary=primary)

    @property
    def config(self) -> RunConfig:
        """The config of the run."""
        return self.setup.config

    @property
    def name(self) -> str:
        """The title of the run: `train.name`, or the name of its directory."""
        return self.config.train.name or self.workdir.absolute().name

    @property
    def is_primary(self) -> bool:
        """Whether this is process 0, which writes what the run has once."""
        return self.setup.machine.is_primary

    def say(self, text: str) -> None:
        """Print a line on stderr, on process 0 only."""
        if self.is_primary:
            say(text)


@contextlib.contextmanager
def open_run(
    setup: Setup, workdir: Path, *, shutdown: Shutdown, undo: contextlib.ExitStack
) -> Iterator[Run]:
    """Lock the directory of a run and open what is written there. To be called by all processes.

    undo: as in Run.
    """
    machine = setup.machine
    with contextlib.ExitStack() as stack:
        lock = lock_workdir(workdir, process_id=machine.process_id, undo=undo)
        is_locked = stack.enter_context(lock)
        check_shared_directory(workdir, key="--workdir")
        checkpointer = stack.enter_context(_open_checkpoints(setup, workdir, undo))
        shutdown.call_before_exit(lambda: previous_checkpoint(checkpointer))
        stack.enter_context(exit_on_error())  # before the checkpointer waits for other processes
        stack.callback(undo.close)  # before this process exits
        run = Run(setup, workdir, checkpointer, is_locked=is_locked, shutdown=shutdown, undo=undo)
        if machine.is_primary:
            stack.enter_context(run.log)
        stack.enter_context(run.box)
        yield run


@contextlib.contextmanager
def read_run(setup: Setup, workdir: Path) -> Iterator[Run]:
    """Open the directory of a run as `open_run` does, but lock and write nothing."""
    with _open_checkpoints(setup, workdir, None) as checkpointer, contextlib.ExitStack() as undo:
        yield Run(setup, workdir, checkpointer, is_locked=False, shutdown=Shutdown(), undo=undo)


@contextlib.contextmanager
def lock_workdir(workdir: Path, *, process_id: int, undo: contextlib.ExitStack) -> Iterator[bool]:
    """Make `workdir` if needed and lock it against a second run; yield whether that was possible.

    undo: given what removes the lock's file, if that is new; closed before the lock is released.
    """
    file = workdir / LOCK.format(process_id=process_id)
    is_new = not file.exists()
    try:
        lock, no_lock = _locked(file)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: {error.strerror}; choose a directory that can be written"
        ) from None
    if no_lock and process_id == 0:
        say(
            f"warning: --workdir={workdir} cannot be locked ({no_lock}): nothing keeps a second "
            "run out of it"
        )
    with lock:
        if is_new:
            undo.callback(file.unlink, missing_ok=True)
        try:
            yield not no_lock
        finally:
            undo.close()


def _locked(file: Path) -> tuple[IO[str], str | None]:
    """Return the locked file, and why it could not be locked where the file system has no locks."""
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


def _open_checkpoints(
    setup: Setup, workdir: Path, undo: contextlib.ExitStack | None
) -> Checkpointer:
    """Open the directory of the checkpoints, and mark it as this run's, where `undo` is given.

    To be called by all processes.
    """
    c = setup.config.checkpoint
    directory = checkpoint_directory(workdir, c.directory)
    check_usable(directory)
    if undo is None:
        check_unclaimed(directory, workdir)
    else:
        if (words := claim(directory, workdir, undo)) and setup.machine.is_primary:
            say(words)
        if not is_remote(directory) and locate(workdir) not in directory.parents:
            check_shared_directory(directory, key="checkpoint.directory")
    mine = functools.partial(check_owner, directory, workdir)
    return Checkpointer(
        directory,
        keep=c.keep,
        keep_every=c.keep_every,
        asynchronous=c.asynchronous and setup.machine.saves_asynchronously,
        check_owner=mine if c.directory is not None else None,
        on_complete=report_checkpoint,
    )


def previous_checkpoint(checkpointer: Checkpointer) -> str:
    """Describe the checkpoint that a rerun continues from."""
    try:
        steps = checkpointer.steps()
    except (UserError, OSError):
        return f"the newest in {checkpointer.directory}, which cannot be read now"
    return f"{checkpointer.directory / str(steps[-1])}" if steps else "none yet, it starts anew"


def keep_tokenizer(workdir: Path, source: str, record: Mapping[str, Any]) -> None:
    """Copy the tokenizer of `source`, so that the workdir is complete wherever it is moved.

    record: of the run's tokenizer; one that is already kept stays, a damaged one is replaced.
    """
    target, wanted = workdir / TOKENIZER, record["fingerprint"]
    try:
        kept = data.load_tokenizer(target, fingerprint=wanted) if target.is_dir() else None
        if kept is not None and kept.fingerprint == wanted:
            return
    except UserError as error:
        say(f"warning: {error}; this copy of the run's tokenizer is written again from {source}")
    tokenizer = data.load_tokenizer(source)
    with replaced_directory(target) as hidden:
        tokenizer.save(hidden)
