"""The directory of a run: locked, opened, and changed only once its start is accepted."""

import contextlib
import dataclasses
import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TextIO

import jax

from llamajax import data
from llamajax.backends import report_checkpoint
from llamajax.checkpoint import Checkpointer
from llamajax.checkpoint.directory_owner import check_owner, checkpoint_directory, claim
from llamajax.checkpoint.location import check_usable, is_remote
from llamajax.config import RunConfig, to_json_dict
from llamajax.errors import TransientError, UserError, say
from llamajax.files import lock_file, replaced_directory, write_file
from llamajax.formats.weights import TOKENIZER
from llamajax.monitoring import EventLog
from llamajax.monitoring.blackbox import BlackBox
from llamajax.monitoring.events import LOCK
from llamajax.processes.host_collectives import broadcast_from_first, raise_together
from llamajax.training.safety.rollback import RollbackLog
from llamajax.training.safety.shutdown import Shutdown, exit_on_error
from llamajax.training.setup import Setup

LOG = "train.log"
# Network file systems show a new file to other hosts only after their caches' time.
_SHARED_WITHIN_S = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a run has from its start to its end, however often it is rolled back.

    log, events, box and checkpointer change nothing on the disk before `begin`. undo: removes what
    a start has to make before it is accepted (folders, lock, claim); closed when it is refused.
    """

    setup: Setup
    workdir: Path
    is_locked: bool  # against a second run
    checkpointer: Checkpointer
    rollbacks: RollbackLog
    log: "LogCopy"
    events: EventLog
    box: BlackBox
    shutdown: Shutdown
    undo: contextlib.ExitStack

    @property
    def config(self) -> RunConfig:
        """The config of the run."""
        return self.setup.config

    @property
    def is_primary(self) -> bool:
        """Whether this is process 0, which writes what the run has once."""
        return self.setup.machine.is_primary

    def say(self, text: str) -> None:
        """Print a line on stderr, on process 0 only."""
        if self.is_primary:
            say(text)


def open_run(
    setup: Setup,
    workdir: Path,
    *,
    is_locked: bool,
    shutdown: Shutdown,
    undo: contextlib.ExitStack,
    stack: contextlib.ExitStack,
) -> Run:
    """Open what a run writes to, until `stack` is closed. To be called by all processes."""
    primary = setup.machine.is_primary
    checkpointer = stack.enter_context(_open_checkpoints(setup, workdir, undo))
    stack.enter_context(exit_on_error())  # before the checkpointer waits for the other processes
    stack.callback(undo.close)  # before this process exits
    log = LogCopy(workdir / LOG)
    if primary:
        stack.enter_context(log)
    box = BlackBox(workdir, steps=setup.config.guard.blackbox_steps, primary=primary)
    return Run(
        setup=setup,
        workdir=workdir,
        is_locked=is_locked,
        checkpointer=checkpointer,
        rollbacks=RollbackLog(workdir, primary=primary),
        log=log,
        events=EventLog(workdir, primary=primary),
        box=stack.enter_context(box),
        shutdown=shutdown,
        undo=undo,
    )


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


def check_shared(directory: Path, *, key: str) -> None:
    """Raise UserError on all processes unless all see the same directory. To be called by all.

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


def _open_checkpoints(setup: Setup, workdir: Path, undo: contextlib.ExitStack) -> Checkpointer:
    """Claim the directory of the run's checkpoints and open it. To be called by all processes."""
    c = setup.config.checkpoint
    directory = checkpoint_directory(workdir, c.directory)
    check_usable(directory)
    if (words := claim(directory, workdir, undo)) and setup.machine.is_primary:
        say(words)
    if not is_remote(directory) and workdir.absolute() not in directory.parents:
        check_shared(directory, key="checkpoint.directory")
    mine = functools.partial(check_owner, directory, workdir)
    return Checkpointer(
        directory,
        keep=c.keep,
        keep_every=c.keep_every,
        asynchronous=c.asynchronous and setup.machine.saves_asynchronously,
        check_owner=mine if c.directory is not None else None,
        on_complete=report_checkpoint,
        hold=True,
    )


def write_config(workdir: Path, config: RunConfig) -> None:
    """Write the resolved config to `config.json`."""
    file = workdir / "config.json"
    write_file(file, json.dumps(to_json_dict(config), indent=1) + "\n", label=f"{file}")


def keep_tokenizer(workdir: Path, config: RunConfig, record: Mapping[str, Any]) -> None:
    """Copy the tokenizer of the data, so that the workdir is complete wherever it is moved.

    record: of the run's tokenizer; one that is already kept stays.
    """
    target = workdir / TOKENIZER
    if target.is_dir() and data.load_tokenizer(target).fingerprint == record["fingerprint"]:
        return
    tokenizer = data.load_tokenizer(config.data.path.split(",")[0].strip())
    with replaced_directory(target) as hidden:
        tokenizer.save(hidden)


class LogCopy:
    """A context in which each line of standard error is also written, with the time, to a file.

    Lines are kept in memory until `begin`. It can be entered several times.
    """

    def __init__(self, file: Path):
        self._file = file
        self._stream: TextIO | None = None
        self._lock = threading.Lock()
        self._line, self._kept, self._begun = "", [], False

    def __enter__(self) -> "LogCopy":
        self._stream, sys.stderr = sys.stderr, self
        return self

    def __exit__(self, *_: object) -> None:
        sys.stderr = self._stream

    def begin(self) -> None:
        """Write the lines that were kept, and all later ones at once."""
        with self._lock:
            self._begun = True
            self._flush()

    def write(self, text: str) -> int:
        """Write to standard error and to the file."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with self._lock:
            # A progress bar writes over itself: only what follows its last return counts.
            found = (self._line + text).split("\n")
            *lines, self._line = (line.rpartition("\r")[2] for line in found)
            self._kept += [f"{now}  {line}\n" for line in lines]
            self._flush()
        return self._stream.write(text) if self._stream is not None else len(text)

    def _flush(self) -> None:
        if self._begun and self._kept:
            with contextlib.suppress(OSError), self._file.open("a", errors="replace") as file:
                file.writelines(self._kept)
            self._kept = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
