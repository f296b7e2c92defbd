"""The black box: the last steps of a run, on disk when something goes wrong.

    blackbox/recent.jsonl, recent.old.jsonl   the last steps of a run in progress
    blackbox/STEP_REASON.jsonl                what they were when something happened

Rows are appended as the run goes on, each with one write, so they outlive a process that is killed;
the next start finds them and keeps them as `STEP_killed`. Lines are those of `metrics.jsonl`: the
first says what happened, each other one is a step.
"""

import collections
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from llamajax.errors import say
from llamajax.monitoring.metrics import decode_row, encode_row

BLACKBOX = "blackbox"
_RECENT, _OLDER = "recent.jsonl", "recent.old.jsonl"
_BOXES_KEPT = 32


class BlackBox:
    """Keeps the rows of the last `steps` steps. Not primary: does nothing at all.

    when_accepted: makes a change to the disk, perhaps later; rows may be added from then on.
    As a context manager it writes a box for an error that passes, and cleans up without one. A disk
    that fills up costs the box and one warning, never the run.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        steps: int,
        primary: bool,
        when_accepted: Callable[[Callable[[], None]], None] = lambda change: change(),
    ):
        self._directory = Path(workdir) / BLACKBOX
        self._rows: collections.deque[Mapping[str, Any]] = collections.deque(maxlen=steps)
        self._primary, self._warned, self._begun = primary, False, False
        self._descriptor: int | None = None
        self._lines = 0
        if primary:
            when_accepted(self._keep_leftovers)

    def add(self, row: Mapping[str, Any]) -> None:
        """Enter a step; `row` has `step` and flat JSON values."""
        if not self._primary:
            return
        self._rows.append(dict(row))
        with self._reporting():
            if self._descriptor is None or self._lines >= self._rows.maxlen:
                self._turn_over()
            os.write(self._descriptor, f"{encode_row(row)}\n".encode())
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
        with self._reporting():
            _write(file, [encode_row(row) for row in (head, *self._rows)])
            self._prune()
            return file
        return None

    def __enter__(self) -> "BlackBox":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._rows and self._directory.parent.is_dir():
            self.write("crash", step=self.newest_step, error=f"{kind.__name__}: {error}")
        self._close()
        if self._begun:
            with self._reporting():
                for name in (_RECENT, _OLDER):
                    (self._directory / name).unlink(missing_ok=True)

    def _turn_over(self) -> None:
        """Start a new file of recent rows; the last one's are kept beside it."""
        self._close()
        self._directory.mkdir(exist_ok=True)
        recent = self._directory / _RECENT
        if self._lines:
            recent.replace(self._directory / _OLDER)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        self._descriptor, self._lines = os.open(recent, flags, 0o666), 0

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _keep_leftovers(self) -> None:
        """Rows that a killed process left become a box of their own."""
        self._begun = True
        with self._reporting():
            files = [self._directory / name for name in (_OLDER, _RECENT)]
            rows = [row for file in files if file.exists() for row in _rows(file)]
            self._rows.extend(rows)
            if self._rows:
                self.write("killed", step=self.newest_step)
                self._rows.clear()
            for file in files:
                file.unlink(missing_ok=True)

    def _prune(self) -> None:
        boxes = sorted(self._directory.glob("*_*.jsonl"), key=lambda file: file.stat().st_mtime)
        for file in boxes[:-_BOXES_KEPT]:
            file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turn what the disk refuses into one warning."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                text = f"warning: {self._directory} cannot be written: {error.strerror}"
                say(f"{text}; training goes on")


def last_seen(workdir: Path) -> dict[str, Any]:
    """Return the last `step` that a killed process entered, and when (`time_s`); 0 without one."""
    file = Path(workdir) / BLACKBOX / _RECENT
    rows = _rows(file) if file.exists() else []
    return {"step": rows[-1]["step"], "time_s": file.stat().st_mtime} if rows else {"step": 0}


def read_box(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a box says happened, and its steps in order; ValueError if the file is none."""
    head, *rows = _rows(file) or [{}]
    if "reason" not in head:
        raise ValueError(f"{file} is not a black box: its first line has no reason")
    return head, rows


def boxes(workdir: Path) -> list[Path]:
    """The boxes of a run, newest first."""
    found = (Path(workdir) / BLACKBOX).glob("*_*.jsonl")
    return sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)


def _rows(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [row for row in map(decode_row, lines) if row is not None]


def _write(file: Path, lines: list[str]) -> None:
    file.parent.mkdir(exist_ok=True)
    hidden = file.with_name(f".{file.name}.partial")
    with hidden.open("w", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)
        stream.flush()
        os.fsync(stream.fileno())
    hidden.replace(file)
