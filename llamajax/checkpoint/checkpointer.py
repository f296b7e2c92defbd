"""Saving checkpoints in the background, and keeping the right ones.

A save costs the step only the copy to the host. The rest (writing, checksums, commit, retention)
happens in threads, and a failure there surfaces at the next call. All methods that write are to be
called by all processes; the files that belong to all are written by process 0.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llamajax.checkpoint import manifest as manifests
from llamajax.checkpoint.fallback import newest_whole
from llamajax.checkpoint.names import named_leaves
from llamajax.checkpoint.parts import prove_readable
from llamajax.checkpoint.restore import Checkpoint
from llamajax.checkpoint.room import (
    here,
    make_sure_of_room,
    reached,
    reason,
    see_all_parts,
)
from llamajax.checkpoint.storage import Place, error_type, failures, is_remote, place, remove_tree
from llamajax.errors import UserError
from llamajax.processes.agreement import agree, raise_together, told

if TYPE_CHECKING:
    from llamajax.checkpoint.orbax_writer import OrbaxWriter

# Loggers that Orbax (and its tasks, when they fail unobserved) and gcsfs write tracebacks to.
_NOISY = ("absl", "asyncio", "gcsfs")
_SAVE_FAILURES = (OSError, ValueError, RuntimeError)


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved: disk full, no permission, a vanished directory.

    Earlier checkpoints are untouched, and the Checkpointer can be used again. step: of the one that
    was not saved.
    """

    def __init__(self, text: str, *, step: int):
        super().__init__(text)
        self.step = step


@dataclasses.dataclass(frozen=True)
class _Failure:
    """Why a save failed here; of_others: it did so on another process."""

    text: str
    of_others: bool = False


class _DropOrbaxRecords(logging.Filter):
    """Orbax logs each error, with tracebacks, from several threads; we report it once ourselves."""

    def filter(self, record: logging.LogRecord) -> bool:
        told = "orbax" in record.pathname or "orbax" in record.getMessage()
        return not told and record.name != "gcsfs"


def _describe(leaf: Any) -> tuple[str, tuple[int, ...]]:
    return str(leaf.dtype), tuple(leaf.shape)


def _storable(name: str, leaf: Any) -> Any:
    """The leaf as Orbax takes it: a jax or NumPy array. Typed PRNG keys are refused."""
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
    `save` returns before the files are written. check_owner: asked by process 0 before each save;
    raises OSError where the directory is another run's by now. on_complete: called by process 0,
    in a thread, with the step of each checkpoint that is complete. when_accepted: makes a change to
    the directory, perhaps later. Removes what a killed save left behind, so only the run itself may
    make one; to read checkpoints use `open_checkpoint`.
    """

    def __init__(
        self,
        directory: Place,
        *,
        keep: int,
        keep_every: int | None,
        asynchronous: bool,
        check_owner: Callable[[], None] = lambda: None,
        on_complete: Callable[[int], None] = lambda step: None,
        when_accepted: Callable[[Callable[[], None]], None] = lambda change: change(),
    ):
        if keep < 1:
            raise UserError(f"checkpoint.keep is {keep}; at least 1 checkpoint must be kept")
        if keep_every is not None and keep_every < 1:
            raise UserError(f"checkpoint.keep_every is {keep_every}; it must be positive or none")
        self.directory = place(directory)
        self.last_stall_s = 0.0
        self._keep = keep
        self._keep_every = keep_every
        self._asynchronous = asynchronous
        self._check_owner = check_owner
        self._on_complete = on_complete
        self._when_accepted = when_accepted
        self._is_primary = jax.process_index() == 0
        self._orbax: OrbaxWriter | None = None
        self._thread: threading.Thread | None = None
        self._failure: _Failure | None = None
        self._writers: list[int] = []
        self._unsettled = False
        self._saving: int | None = None
        self.completed: collections.deque[int] = collections.deque()  # steps, for whoever asks
        self._pending: tuple[int, dict[str, tuple[str, tuple[int, ...]]], str] | None = None
        self._filter = _DropOrbaxRecords()
        for name in _NOISY:
            logging.getLogger(name).addFilter(self._filter)
        when_accepted(self._remove_leftovers)

    def _remove_leftovers(self) -> None:
        problem = None
        try:
            if self._is_primary:
                manifests.remove_leftovers(self.directory)
        except failures(self.directory) as error:
            kind = error_type(error, self.directory)
            problem = kind(f"cannot clear {self.directory}: {reason(error)}")
        raise_together(problem)

    def get_ready(self) -> None:
        """Have the first save find everything made; to be called by all processes, or by none.

        For a moment at which nothing waits for this process. Cheap when it is repeated.
        """
        self._writer()

    def _writer(self) -> "OrbaxWriter":
        if self._orbax is None:
            from llamajax.checkpoint.orbax_writer import OrbaxWriter  # takes long to import

            self._orbax = OrbaxWriter(self.directory, seal=self._seal)
        return self._orbax

    @property
    def in_flight(self) -> int | None:
        """The step whose checkpoint is being written now, or None."""
        return self._saving if self._thread is not None and self._thread.is_alive() else None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending. UserError: the store cannot be reached."""
        with reached(self.directory):
            return self._steps()

    def _steps(self) -> list[int]:
        return manifests.complete_steps(self.directory)

    def newest_whole(self, *, without: Collection[int] = ()) -> tuple[Checkpoint | None, list[str]]:
        """Where to continue and what to say loudly, past damaged ones; see `fallback`."""
        with reached(self.directory):
            return newest_whole(self.directory, without=without, when_accepted=self._when_accepted)

    def save(self, step: int, state: Any, *, meta: Mapping[str, Any], wait: bool = False) -> None:
        """Save `state` and `meta` together as the checkpoint of `step`.

        Returns when the state is safe from being overwritten or donated: at once on the host,
        after the copy on a device. Raises CheckpointError if this save fails at once, or if the
        previous one failed in the background: then nothing is written, and the call may be
        repeated. A step that is already there, complete, is not written again.
        """
        started = time.monotonic()
        try:
            self.wait()
            if self._is_there(step):
                return
            self._start(step, state, meta)
            if wait or not self._asynchronous:
                self.wait()
        finally:
            self.last_stall_s = time.monotonic() - started

    def check(self) -> None:
        """Raise the CheckpointError of a save that has failed in the background; never blocks.

        Does nothing where there are several processes: they learn of failures together, in `wait`.
        """
        if jax.process_count() == 1 and self.in_flight is None:
            self.wait()

    def wait(self) -> None:
        """Block until the save in progress is complete. Raises its CheckpointError."""
        self._join()
        failure, self._failure = self._failure, None
        if self._unsettled:
            self._unsettled = False
            # What happened on a process first, and only then what others saw of it.
            first = agree(None if failure is None or failure.of_others else failure.text)
            text = first or agree(failure.text if failure else None)
        else:
            text = failure.text if failure else None
        if text is not None:
            assert self._pending is not None
            raise CheckpointError(text, step=self._pending[0])

    def close(self) -> None:
        """Wait for the save in progress, then release the threads. Raises its CheckpointError."""
        try:
            self.wait()
        finally:
            self._release()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _release(self) -> None:
        if self._orbax is not None:
            self._orbax.close()
        for name in _NOISY:
            logging.getLogger(name).removeFilter(self._filter)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            # The other processes may be gone: finish what this one was writing, agree on nothing.
            self._join()
            self._release()

    def _is_there(self, step: int) -> bool:
        """Process 0's answer, on all; CheckpointError on all where it is there, and damaged."""
        problem = None
        try:
            found = self._found(step) if self._is_primary else 0
            if found and (damage := manifests.find_damage(self.directory / str(step))):
                problem = f"a damaged one is in the way ({damage})"
        except failures(self.directory) as error:
            problem = reason(error)
        if problem := agree(problem):
            text = f"checkpoint of step {step} was not saved: {problem}"
            raise CheckpointError(text, step=step)
        return bool(told(found))

    def _found(self, step: int) -> int:
        """1 where this step is there; in an object store, what is no checkpoint gives way."""
        self._check_owner()
        directory = self.directory / str(step)
        if not is_remote(directory):
            return int(directory.exists())
        if manifests.is_committed(directory):
            return 1
        remove_tree(directory)
        return 0

    def _start(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        leaves = {name: _storable(name, leaf) for name, leaf in named_leaves(state).items()}
        arrays = {name: _describe(leaf) for name, leaf in leaves.items()}
        text = json.dumps(meta, indent=1, allow_nan=False)
        self._pending = (step, arrays, text)
        writer = self._writer()
        with self._reporting(step):
            self._writers = make_sure_of_room(self.directory, leaves)
        if self._failure is not None:  # on all processes
            self.wait()
        self._unsettled = True
        with self._reporting(step):
            writer.save(self.directory / str(step), leaves)
        if self._failure is None:
            self._saving = step
            self._in_background(self._finish, step)
        elif jax.process_count() == 1:
            self._clear()
            self.wait()
        else:
            self._in_background(self._give_up, step)

    def _seal(self) -> None:
        """Called by Orbax on process 0 after all files are written, before the rename."""
        assert self._pending is not None
        step, arrays, meta = self._pending
        directory = self.directory / str(step)  # where an object store has it from the start
        if not is_remote(directory):
            (directory,) = self.directory.glob(f"{step}.orbax-checkpoint-tmp*")
        see_all_parts(directory / manifests.STATE, self._writers)
        prove_readable(directory / manifests.STATE, arrays)
        manifests.write_durably(directory / manifests.META, meta)
        manifests.seal(directory, step=step, arrays=arrays)

    def _in_background(self, work: Callable[[int], None], step: int) -> None:
        self._thread = threading.Thread(target=work, args=(step,), name=f"checkpoint_{step}")
        self._thread.start()

    def _give_up(self, step: int) -> None:
        """In the background, where a save failed before anything was written in it."""
        self._writer().rendezvous.failed()
        self._clear()

    def _clear(self) -> None:
        """Remove what a failed save left, now that nobody writes there any more."""
        if self._is_primary:
            with contextlib.suppress(*failures(self.directory)):
                manifests.remove_leftovers(self.directory)

    def _finish(self, step: int) -> None:
        """In the background: wait for the commit, then delete what need not be kept."""
        self._failure = _Failure(f"checkpoint of step {step} was not saved: its thread died")
        with self._reporting(step):
            self._writer().wait()
            if self._is_primary:
                manifests.check_sizes(self.directory / str(step))
            self._failure = None
            self.completed.append(step)
        if self._failure is not None:
            self._give_up(step)
        elif self._is_primary:
            self._on_complete(step)
            # What can't be deleted now is tried again after the next save.
            with contextlib.suppress(*failures(self.directory)):
                self._prune(step)

    @contextlib.contextmanager
    def _reporting(self, step: int) -> Iterator[None]:
        """Turn the failure of a save into `self._failure`."""
        try:
            yield
        except (*_SAVE_FAILURES, *failures(self.directory), manifests.DamagedError) as error:
            try:
                steps = self._steps()
                newest = (
                    f"the newest complete one is step {steps[-1]}" if steps else "there is none yet"
                )
            except failures(self.directory) as another:
                newest = f"earlier ones cannot be seen: {reason(another)}"
            self._failure = _Failure(
                f"checkpoint of step {step} was not saved: {here(reason(error))}; {newest}",
                of_others=isinstance(error, TimeoutError),
            )

    def _prune(self, newest: int) -> None:
        """Delete old checkpoints, now that the one of step `newest` is complete."""
        earlier = [step for step in self._steps() if step < newest]
        for step in earlier[: max(0, len(earlier) - (self._keep - 1))]:
            if self._keep_every is None or step % self._keep_every != 0:
                manifests.remove_checkpoint(self.directory / str(step))
