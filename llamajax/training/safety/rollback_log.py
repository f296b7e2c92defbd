"""The record of a run's rollbacks, `audit.jsonl`, for people and for resuming.

A rollback counts from the moment its line is on disk; the checkpoints of later steps are gone by
then. Checkpoints know how many rollbacks they come after (`rollbacks` in their meta).
"""

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from llamajax import data
from llamajax.data.position import Segment
from llamajax.errors import UserError

AUDIT = "audit.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollback:
    """At step `at_step`, back to step `to_step`, which continues with the data of `segment`.

    reached: how far each source had been read (`data.tokens_reached`), for the stages after it;
    empty in records of earlier releases.
    """

    at_step: int
    to_step: int
    first_skipped_step: int  # the first of those that were left out in a row
    segment: dict[str, Any]
    reason: str
    reached: dict[str, int] = dataclasses.field(default_factory=dict)


class RollbackLog:
    """The rollbacks of a run, in order. Only process 0 writes them to disk."""

    def __init__(self, workdir: Path, *, primary: bool):
        self._file, self._primary = workdir / AUDIT, primary
        self.entries = _read(self._file)

    def add(self, entry: Rollback) -> None:
        """Record a rollback; when this returns, it has happened. UserError if the disk refuses."""
        self.entries.append(entry)
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

    def position(self, saved: data.Position, *, step: int, rollbacks: int) -> data.Position:
        """Return where a checkpoint's run continues in the data: after what was left out since.

        saved, step, rollbacks: of the checkpoint.
        """
        # One that went back to a later step than this says nothing about the data from here on.
        since = [entry for entry in self.entries[rollbacks:] if entry.to_step <= step]
        if not since:
            return saved
        segment = Segment.from_json(since[-1].segment | {"first_step": step})
        before = dataclasses.replace(saved.until(step), reached=saved.reached | since[-1].reached)
        return before.extended(segment)


def _read(file: Path) -> list[Rollback]:
    fields, found = {field.name for field in dataclasses.fields(Rollback)}, []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError, TypeError):  # cut off by a crash: it did not happen
            entry = json.loads(line)
            found.append(Rollback(**{name: entry[name] for name in fields & entry.keys()}))
    return found
