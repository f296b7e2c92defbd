"""`audit.jsonl`: what a run did on its own that changed its course, for people and for resuming.

A rollback counts from the moment its line is on disk. Checkpoints know how many they come after
(`rollbacks` in their meta); those that come after fewer, and hold later steps, are superseded.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamajax import data
from llamajax.checkpoint import Checkpointer, open_checkpoint
from llamajax.checkpoint.location import store_errors_explained
from llamajax.checkpoint.manifest import remove_checkpoint
from llamajax.data.position import Segment
from llamajax.errors import UserError
from llamajax.processes.host_collectives import broadcast_from_first

AUDIT = "audit.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollback:
    """At step `at_step`, back to step `to_step`, which goes on with the data of `segment`."""

    at_step: int
    to_step: int
    first_skipped_step: int  # the first of those that were left out in a row
    segment: dict[str, Any]
    reason: str


class Audit:
    """The rollbacks of a run, in order. Only process 0 writes them to disk."""

    def __init__(self, workdir: Path, *, primary: bool):
        self._file, self._primary = workdir / AUDIT, primary
        self.rollbacks = [Rollback(**entry) for entry in _entries(self._file)]

    def returns_to(self, step: int) -> int:
        """How often the run has gone back to `step` already."""
        return sum(entry.to_step == step for entry in self.rollbacks)

    def add(self, entry: Rollback) -> None:
        """Note a rollback; when this returns, it has happened. UserError if the disk refuses."""
        self.rollbacks.append(entry)
        if not self._primary:
            return
        line = json.dumps({"event": "rollback", "time": time.time(), **dataclasses.asdict(entry)})
        try:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(f"\n{line}\n")  # a line that a full disk broke ends here
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self._file}: {error.strerror}; without it no rollback can be made"
            ) from None

    def superseded(
        self, checkpointer: Checkpointer, when_accepted: Callable[[Callable[[], None]], None]
    ) -> list[int]:
        """Return, on process 0, the checkpoints that a rollback went back before.

        when_accepted: removes them, perhaps later. To be called by all processes.
        """
        found: list[int] = []

        def find() -> None:
            if not self.rollbacks:
                return
            with store_errors_explained(checkpointer.directory):
                later = [s for s in checkpointer.steps() if s > self.rollbacks[-1].to_step]
                found.extend(s for s in later if self._is_superseded(checkpointer, s))

        def remove() -> None:
            with store_errors_explained(checkpointer.directory):
                for step in found:
                    remove_checkpoint(checkpointer.directory / str(step))

        broadcast_from_first(find)
        when_accepted(lambda: broadcast_from_first(remove))
        return found

    def _is_superseded(self, checkpointer: Checkpointer, step: int) -> bool:
        try:
            meta = open_checkpoint(checkpointer.directory / str(step)).meta
            return meta.get("rollbacks", 0) < len(self.rollbacks)
        except UserError:
            return False  # damaged: restoring puts it aside

    def position(self, saved: data.Position, *, step: int, rollbacks: int) -> data.Position:
        """Where a checkpoint's run goes on in the data: after what has been left out since."""
        # One that went back to a later step than this says nothing about the data from here on.
        since = [r for r in self.rollbacks[rollbacks:] if r.to_step <= step]
        if not since:
            return saved
        segment = Segment(**since[-1].segment | {"first_step": step})
        return data.Position((*saved.segments, segment))


def _entries(file: Path) -> list[dict[str, Any]]:
    fields = {field.name for field in dataclasses.fields(Rollback)}
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            entry = json.loads(line)
            found.append({name: entry[name] for name in fields})
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a crash: it did not happen
    return found
