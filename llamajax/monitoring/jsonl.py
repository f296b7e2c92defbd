"""Rows as lines of strict JSON, and files that hold one object.

Numbers read back bit for bit. JSON has no NaN and no infinity: such a value is written as null and
named in the row's `nonfinite` object, e.g. `{"step": 7, "loss": null, "nonfinite": {"loss":
"nan"}}`; `decode_row` undoes this. A plain null means unknown.
"""

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamajax.errors import say

_NONFINITE = "nonfinite"


def plain_number(value: Any) -> Any:
    """Convert a NumPy scalar to the Python number of the same value; return others unchanged."""
    return value.item() if hasattr(value, "item") else value


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Return whether a row is of an evaluation: some names begin with `eval_` or `task/`."""
    return any(name.startswith(("eval_", "task/")) for name in row)


def encode_row(row: Mapping[str, Any]) -> str:
    """Return a row as one line, without its end. float32 values keep their exact value."""
    plain = {key: plain_number(value) for key, value in row.items()}
    odd = {k: v for k, v in plain.items() if isinstance(v, float) and not math.isfinite(v)}
    if odd:
        plain |= dict.fromkeys(odd)
        plain[_NONFINITE] = {key: repr(value) for key, value in odd.items()}
    return json.dumps(plain, allow_nan=False)


def decode_row(line: str) -> dict[str, Any] | None:
    """Return the row of a line; None for a line that is not a whole row with a `step`."""
    try:
        row = json.loads(line)
        if not isinstance(row["step"], int):
            return None
        return row | {key: float(text) for key, text in row.pop(_NONFINITE, {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file; none where there is no file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the whole rows of a file in its order; none where there is no file."""
    return [row for row in map(decode_row, read_lines(path)) if row is not None]


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class RowFile:
    """Appends rows to a file, each whole or not at all.

    Rows wait in memory until `begin`, and while a full disk refuses them.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lock = threading.Lock()
        self._waiting, self._begun, self._warned = b"", False, False

    def begin(self) -> None:
        """Write the rows that wait; write later ones at once."""
        with self._lock:
            self._begun = True
            self._flush()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row after those that wait."""
        with self._lock:
            self._waiting += f"{encode_row(row)}\n".encode()
            self._flush()

    def close(self) -> None:
        """Write the rows that wait, or warn that they are lost."""
        with self._lock:
            self._flush()
            if self._waiting and self._begun:
                lost = self._waiting.decode().splitlines()
                say(f"warning: {self._path}: there was no room for its last lines: {lost}")

    def _flush(self) -> None:
        if not self._begun or not self._waiting:
            return
        try:
            _append_whole(self._path, self._waiting)
            self._waiting = b""
        except OSError as error:
            if not self._warned:
                say(
                    f"warning: {self._path}: {error.strerror}; its lines are kept for later, and "
                    "training goes on"
                )
            self._warned = True


def _append_whole(path: Path, data: bytes) -> None:
    """Append all of `data`, or none of it: a full disk takes a part and then refuses."""
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, 2)
        if end:
            file.seek(end - 1)
            data = data if file.read(1) == b"\n" else b"\n" + data  # after a killed writer's line
        try:
            written = os.write(file.fileno(), data)
            if written < len(data):
                os.write(file.fileno(), data[written:])
        except OSError:
            file.truncate(end)
            raise
