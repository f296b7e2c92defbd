"""The black box: the last steps of a run, on disk when something goes wrong.

    blackbox/recent.jsonl, recent.old.jsonl   the last steps of a run in progress
    blackbox/STEP_REASON.jsonl                the last steps before something happened

Each row is written at once, so that rows outlive a killed process; the next start keeps them as
`STEP_killed`. Lines are those of `metrics.jsonl`: the first says what happened, each other one is a
step.
"""

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from llamajax.errors import say
from llamajax.files import write_file
from llamajax.monitoring.jsonl import encode_row, read_rows

BLACKBOX = "blackbox"
_RECENT, _OLDER = "recent.jsonl", "recent.old.jsonl"
_BOXES_KEPT = 32


class BlackBox:
    """Keeps the rows of the last `steps` steps. Not primary: does nothing at all.

    As a context manager it writes a box when an error passes, and removes the recent rows at the
    end. A full disk costs the box and one warning, never the run.
    """

    def __init__(self, workdir: Path, *, steps: int, primary: bool):
        self._directory = Path(workdir) / BLACKBOX
        self._rows: collections.deque[Mapping[str, Any]] = collections.deque(maxlen=steps)
        self._primary, self._warned, self._begun = primary, False, False
        self._file: BinaryIO | None = None
        self._lines = 0

    def begin(self) -> None:
        """Keep rows that a killed process left as a box of their own. Add rows only after this."""
        if not self._primary:
            return
        self._begun = True
        with self._one_warning():
            self._rows.extend(read_leftovers(self._directory.parent)[0])
            if self._rows:
                self.write("killed", step=self.newest_step)
                self._rows.clear()
            self._remove_recent()

    def add(self, row: Mapping[str, Any]) -> None:
        """Enter a step; `row` has `step` and flat JSON values."""
        if not self._primary:
            return
        self._rows.append(dict(row))
        with self._one_warning():
            if self._file is None or self._lines >= self._rows.maxlen:
                self._start_file()
            self._file.write(f"{encode_row(row)}\n".encode())
            self._lines += 1

    @property
    def newest_step(self) -> int:
        """The last step that was entered; 0 before the first."""
        return self._rows[-1]["step"] if self._rows else 0

    def write(self, reason: str, *, step: int, **facts: Any) -> Path | None:
        """Write the box of something that happened at `step`; the file, or None where it failed."""
        if not self._primary:
            return None
        file = self._directory / f"{step}_{reason}.jsonl"
        head = {"step": step, "reason": reason, "time": time.time(), **facts}
        with self._one_warning():
            file.parent.mkdir(exist_ok=True)
            lines = [f"{encode_row(row)}\n" for row in (head, *self._rows)]
            write_file(file, "".join(lines), durable=True)
            for old in boxes(self._directory.parent)[_BOXES_KEPT:]:
                old.unlink(missing_ok=True)
            return file
        return None

    def __enter__(self) -> "BlackBox":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._rows and self._directory.parent.is_dir():
            self.write("crash", step=self.newest_step, error=f"{type(error).__name__}: {error}")
        self._close()
        if self._begun:
            with self._one_warning():
                self._remove_recent()

    def _remove_recent(self) -> None:
        for name in (_RECENT, _OLDER):
            (self._directory / name).unlink(missing_ok=True)

    def _start_file(self) -> None:
        """Start a new file of recent rows; keep the last one beside it."""
        self._close()
        self._directory.mkdir(exist_ok=True)
        recent = self._directory / _RECENT
        if self._lines:
            recent.replace(self._directory / _OLDER)
        self._file, self._lines = recent.open("wb", buffering=0), 0

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @contextlib.contextmanager
    def _one_warning(self) -> Iterator[None]:
        """Turn what the disk refuses into one warning."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                text = f"warning: {self._directory} cannot be written: {error.strerror}"
                say(f"{text}; training goes on")


def read_leftovers(workdir: Path) -> tuple[list[dict[str, Any]], float]:
    """Return the rows that a killed process left, and when it wrote the last (wall clock, s)."""
    files = [Path(workdir) / BLACKBOX / name for name in (_OLDER, _RECENT)]
    times = [file.stat().st_mtime for file in files if file.exists()]
    return [row for file in files for row in read_rows(file)], max(times, default=0.0)


def read_box(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what a box says happened, and its steps in order; ValueError if the file is none."""
    head, *rows = read_rows(file) or [{}]
    if "reason" not in head:
        raise ValueError(f"{file} is not a black box: its first line has no reason")
    return head, rows


def boxes(workdir: Path) -> list[Path]:
    """Return the boxes of a run, newest first."""
    found = (Path(workdir) / BLACKBOX).glob("*_*.jsonl")
    return sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)
