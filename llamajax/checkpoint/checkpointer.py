"""Save checkpoints in the background and keep the right ones.

A save costs the step only the copy to the host. Writing, checksums, commit and retention happen in
threads, and a failure there surfaces at the next call. All methods that write are to be called by
all processes; process 0 writes the files that belong to all.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llamajax.checkpoint import location
from llamajax.checkpoint import manifest as manifests
from llamajax.checkpoint.leaf_names import named_leaves
from llamajax.checkpoint.location import Location
from llamajax.checkpoint.restore import Checkpoint, Damaged, newest_intact, set_aside_damaged
from llamajax.checkpoint.save_checks import check_all_parts, check_room
from llamajax.checkpoint.stored_array import prove_readable
from llamajax.processes.host_collectives import broadcast_from_first, first_problem

if TYPE_CHECKING:
    from llamajax.checkpoint.orbax_writer import OrbaxWriter

_SAVE_FAILURES = (OSError, ValueError, RuntimeError, manifests.DamagedError)


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved: disk full, no permission, a vanished directory.

    Earlier checkpoints are untouched, and the Checkpointer can be used again. step: of the one that
    was not saved.
    """

    def __init__(self, text: str, *, step: int):
        super().__init__(text)
        self.step = step


@dataclasses.dataclass
class _Save:
    """The save in progress, or the last one.

    arrays: dtype and shape by name. writers: processes that have something to write. started: Orbax
    was asked to write, and the processes have not compared yet how that went. failure: why this
    process could not save; seen_elsewhere: because another one could not.
    """

    step: int
    arrays: dict[str, tuple[str, tuple[int, ...]]]
    meta: str
    writers: list[int] = dataclasses.field(default_factory=list)
    started: bool = False
    failure: str | None = None
    seen_elsewhere: bool = False
    thread: threading.Thread | None = None


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Drop what Orbax logs: each error with tracebacks, from several threads. We report it once."""
    text = record.pathname + record.getMessage()
    return "orbax" not in text and "tensorstore" not in text


def _storable(name: str, leaf: Any) -> Any:
    """Return the leaf as Orbax takes it: a jax or NumPy array. Typed PRNG keys are refused."""
    if isinstance(leaf, jax.Array):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{name} is a typed PRNG key; keep jax.random.key_data() in the state")
        return leaf
    # A Python number is stored with the dtype that tracing would give it.
    return np.array(leaf, dtype=jax.dtypes.result_type(leaf), copy=True)


class Checkpointer:
    """Saves the state of one run under a directory, one subdirectory a step.

    directory: `checkpoints/`, or a URL in an object store. keep: newest checkpoints kept.
    keep_every: checkpoints whose step is a multiple of this are kept as well. asynchronous: whether
    `save` returns before the files are written. check_owner: called by process 0 before each save
    and before `remove_after`; raises OSError if the directory is another run's by now. on_complete:
    called by process 0, in a thread, with the step of each checkpoint that is complete. `begin`, or
    the first save, removes what a killed save left behind, so only the run itself may make one; to
    read checkpoints use `open_checkpoint`.

    completed: steps of the saves that ended well, for the caller to take.
    """

    def __init__(
        self,
        directory: Location,
        *,
        keep: int,
        keep_every: int | None,
        asynchronous: bool,
        check_owner: Callable[[], None] | None = None,
        on_complete: Callable[[int], None] | None = None,
    ):
        self.directory = location.locate(directory)
        self.completed: collections.deque[int] = collections.deque()
        self._retention = keep, keep_every
        self._asynchronous = asynchronous
        self._check_owner, self._on_complete = check_owner, on_complete
        self._held: Damaged | None = []  # to be set aside by `begin`; None after that
        self._orbax: OrbaxWriter | None = None
        self._save: _Save | None = None
        for name in ("absl", "asyncio"):  # the second one for tasks whose error nobody takes
            logging.getLogger(name).addFilter(_is_not_orbax)

    def begin(self) -> None:
        """Remove what a killed save left, and set aside the damaged checkpoints found so far.

        To be called by all processes.
        """

        def remove() -> None:
            try:
                manifests.remove_leftovers(self.directory)
            except OSError as error:
                what = f"cannot clear {self.directory}"
                raise location.refusal(error, self.directory, what) from None

        damaged, self._held = self._held or [], None
        broadcast_from_first(remove)
        set_aside_damaged(damaged)

    def warm_up(self) -> None:
        """Import Orbax and start its threads before the first save needs them. Cheap to repeat.

        To be called by all processes, or by none.
        """
        if self._orbax is None:
            from llamajax.checkpoint.orbax_writer import OrbaxWriter  # takes long to import

            self._orbax = OrbaxWriter(self.directory, seal=self._seal)

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending.

        Raises UserError if the object store cannot be reached.
        """
        with location.store_errors_explained(self.directory):
            return manifests.complete_steps(self.directory)

    def newest_intact(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the checkpoint to continue from, and warnings; see `restore.newest_intact`."""
        with location.store_errors_explained(self.directory):
            found, warnings, damaged = newest_intact(self.directory)
            if self._held is None:
                set_aside_damaged(damaged)
            else:
                self._held = damaged
        return found, warnings

    def save(self, step: int, state: Any, *, meta: Mapping[str, Any], wait: bool = False) -> None:
        """Save `state` and `meta` together as the checkpoint of `step`.

        Returns when the state is safe from being overwritten or donated: at once on the host,
        after the copy on a device. Raises CheckpointError if this save fails at once, or if the
        previous one failed in the background: then nothing is written, and the call may be
        repeated. A step that is already there, complete, is not written again.
        """
        self.wait()
        if self._held is not None:
            self.begin()
        if not self._exists(step):
            self._start(step, state, meta)
            if wait or not self._asynchronous:
                self.wait()

    def wait(self) -> None:
        """Block until the save in progress is complete. Raises its CheckpointError."""
        save = self._save
        if save is None:
            return
        self._join()
        text = save.failure
        if save.started:
            # First what happened on a process, and only then what others saw of it.
            text = first_problem(None if save.seen_elsewhere else save.failure)
            text = text or first_problem(save.failure)
        self._save = None
        if text is not None:
            raise CheckpointError(text, step=save.step)

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, the newest first.

        Raises UserError, also if the directory is another run's by now. To be called by all
        processes, while no save is in progress.
        """

        def remove() -> None:
            try:
                if self._check_owner is not None:
                    self._check_owner()
                for path in reversed(manifests.step_directories(self.directory)):
                    if int(path.name) > step:
                        manifests.remove_checkpoint(path)
            except OSError as error:
                what = f"checkpoints after step {step} in {self.directory} cannot be removed"
                raise location.refusal(
                    error, self.directory, what, "repair the directory"
                ) from None

        broadcast_from_first(remove)

    def close(self) -> None:
        """Wait for the save in progress and raise its CheckpointError; release the threads."""
        try:
            self.wait()
        finally:
            self._release()

    def _join(self) -> None:
        if self._save is not None and self._save.thread is not None:
            self._save.thread.join()

    def _release(self) -> None:
        if self._orbax is not None:
            self._orbax.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            # The other processes may be gone: finish this one's writing, call no collective.
            self._join()
            self._release()

    def _exists(self, step: int) -> bool:
        """Return whether a step is saved already, the same on all processes.

        Raises CheckpointError on all if it is there and damaged, or not ours. In an object store,
        what a save left unfinished is removed.
        """
        found, problem, directory = False, None, self.directory / str(step)
        try:
            if jax.process_index() == 0:
                if self._check_owner is not None:
                    self._check_owner()
                found = directory.exists()
                if found and manifests.is_unfinished(directory):
                    directory.rmtree()
                    found = False
            if found and (damage := manifests.find_damage(directory)):
                problem = f"a damaged one is in the way ({damage})"
        except OSError as error:
            problem = location.reason(error)
        if problem := first_problem(problem):
            text = f"checkpoint of step {step} was not saved: {problem}"
            raise CheckpointError(text, step=step)
        return broadcast_from_first(lambda: found)

    def _start(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        leaves = {name: _storable(name, leaf) for name, leaf in named_leaves(state).items()}
        arrays = {name: (str(leaf.dtype), tuple(leaf.shape)) for name, leaf in leaves.items()}
        save = _Save(step, arrays, json.dumps(meta, indent=1, allow_nan=False))
        self._save = save
        self.warm_up()
        with self._failure_recorded(save):
            save.writers = check_room(self.directory, leaves)
        if save.failure is not None:  # on all processes
            self.wait()
        save.started = True
        with self._failure_recorded(save):
            self._orbax.save(self.directory / str(step), leaves)
        has_failed = save.failure is not None
        save.thread = threading.Thread(target=self._finish, args=(save,), name=f"checkpoint_{step}")
        save.thread.start()
        if has_failed and jax.process_count() == 1:
            self.wait()

    def _seal(self) -> None:
        """Called by Orbax on process 0 after all files are written, before the rename."""
        save = self._save
        directory = self.directory / str(save.step)  # where an object store has it from the start
        if not location.is_remote(directory):
            (directory,) = self.directory.glob(f"{save.step}.orbax-checkpoint-tmp*")
        check_all_parts(directory / manifests.STATE, save.writers)
        prove_readable(directory / manifests.STATE, save.arrays)
        manifests.write_durably(directory / manifests.META, save.meta)
        manifests.seal(directory, step=save.step, arrays=save.arrays)

    def _finish(self, save: _Save) -> None:
        """In the background: wait for the commit, then delete what need not be kept."""
        if save.failure is None:
            save.failure = f"checkpoint of step {save.step} was not saved: its thread died"
            with self._failure_recorded(save):
                self._orbax.wait()
                if jax.process_index() == 0:
                    manifests.check_sizes(self.directory / str(save.step))
                save.failure = None
                self.completed.append(save.step)
        if save.failure is not None:
            self._orbax.save_barrier.failed()  # after this no process writes there any more
        if jax.process_index() == 0:
            if save.failure is None and self._on_complete is not None:
                self._on_complete(save.step)
            # What can't be deleted now is tried again after the next save.
            with contextlib.suppress(OSError):
                if save.failure is None:
                    self._prune(save.step)
                else:
                    manifests.remove_leftovers(self.directory)

    @contextlib.contextmanager
    def _failure_recorded(self, save: _Save) -> Iterator[None]:
        """Turn an error in this block into `save.failure`."""
        try:
            yield
        except _SAVE_FAILURES as error:
            try:
                steps = manifests.complete_steps(self.directory)
                newest = (
                    f"the newest complete one is step {steps[-1]}" if steps else "there is none yet"
                )
            except OSError as another:
                newest = f"earlier ones cannot be seen: {location.reason(another)}"
            why = location.with_rank(location.reason(error))
            save.failure = f"checkpoint of step {save.step} was not saved: {why}; {newest}"
            save.seen_elsewhere = isinstance(error, TimeoutError)

    def _prune(self, newest: int) -> None:
        """Delete old checkpoints, now that the one of step `newest` is complete."""
        keep, every = self._retention
        earlier = [s for s in manifests.complete_steps(self.directory) if s < newest]
        for step in earlier[: max(0, len(earlier) - (keep - 1))]:
            if every is None or step % every != 0:
                manifests.remove_checkpoint(self.directory / str(step))
