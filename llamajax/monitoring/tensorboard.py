"""A TensorBoard sink: scalars, and texts such as the config.

tensorboardX's own SummaryWriter hands events to a thread that dies on a full disk; its bounded
queue then blocks. Its event file writer, used here directly, raises.
"""

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

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


@functools.cache
def imported() -> tuple[type, ModuleType, ModuleType]:
    """Import what is used of tensorboardX. To be called where no other thread imports."""
    with _hidden_packages():
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2
    return EventsWriter, event_pb2, summary_pb2


class TensorBoard:
    """Appends to a new event file under `workdir/tensorboard`.

    TensorBoard then hides the points after step `after_step` in older files.
    """

    def __init__(self, workdir: Path, *, after_step: int, config: Mapping[str, Any]):
        writer, self._events, self._summaries = imported()
        directory = workdir / "tensorboard"
        directory.mkdir(parents=True, exist_ok=True)
        # The process id keeps two runs within a second from sharing a file name.
        self._writer = writer(str(directory / "events"), f".{os.getpid()}")
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._add(step=after_step + 1, session_log=start)
        text = json.dumps(config, indent=1)
        self.write_text("config", f"```\n{text}\n```", after_step)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Append scalars, which are float32 there."""
        self._add_values([{"tag": t, "simple_value": float(v)} for t, v in values.items()], step)

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Append a text, which is shown as Markdown."""
        value = {
            "tag": f"{tag}/text_summary",
            "metadata": {"plugin_data": {"plugin_name": "text"}},
            "tensor": {"dtype": "DT_STRING", "string_val": [text.encode()]},
        }
        self._add_values([value], step)

    def _add_values(self, values: list[dict], step: int) -> None:
        self._add(step=step, summary=self._summaries.Summary(value=values))
        self._writer.flush()  # a killed process has written all but its last row

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _add(self, **fields: object) -> None:
        self._writer.write_event(self._events.Event(wall_time=time.time(), **fields))
