"""A synchronous TensorBoard sink: scalars only.

tensorboardX's own SummaryWriter hands events to a thread that dies on a full disk; its bounded
queue then blocks the training loop forever. Its event file writer, used here directly, raises.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamajax.errors import say
from llamajax.monitoring.jsonl import plain_number

_FLUSH_EVERY_S = 20.0
# tensorboardX imports these where they are installed, for what is not used here: torch takes 3 s,
# the clients of object stores another one, all before the first step.
_NOT_NEEDED = ("torch", "boto3", "google.cloud.storage")


@contextlib.contextmanager
def _hidden_packages() -> Iterator[None]:
    """Make them look not installed, unless they are imported already."""
    absent = [name for name in _NOT_NEEDED if sys.modules.setdefault(name, None) is None]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


class TensorBoard:
    """Appends scalars to a new event file under `directory`; OSError where that cannot be made.

    resume_step: TensorBoard then hides the points after it in older files of the directory.
    """

    def __init__(self, directory: Path, *, resume_step: int):
        with _hidden_packages():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        directory.mkdir(parents=True, exist_ok=True)
        # The process id keeps two runs within a second from sharing a file name.
        self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}")
        self._flushed_s, self._failed = time.monotonic(), False
        if resume_step > 0:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step=resume_step + 1, session_log=start)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append the numbers of a row. A full disk ends TensorBoard with a warning, not the run."""
        if self._failed:
            return
        numbers = {tag: plain_number(value) for tag, value in row.items() if tag != "step"}
        values = [
            self._summary.Value(tag=tag, simple_value=float(value))
            for tag, value in numbers.items()
            if isinstance(value, int | float)
        ]
        try:
            self._add(step=int(row["step"]), summary=self._summary(value=values))
            if time.monotonic() - self._flushed_s > _FLUSH_EVERY_S:
                self._writer.flush()
                self._flushed_s = time.monotonic()
        except OSError as error:
            self._failed = True
            say(f"warning: tensorboard/ is no longer written: {error.strerror}; training goes on")

    def close(self) -> None:
        """Write what is left, if the disk takes it."""
        with contextlib.suppress(OSError):
            self._writer.close()

    def _add(self, **fields: object) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), **fields))
