"""`metrics.jsonl`: one strict JSON object a logged step, and the same numbers for TensorBoard.

Numbers are written so that they read back bit for bit. JSON has no NaN and no infinities: such a
value is written as null, and named in the row's `nonfinite` object, e.g.
`{"step": 7, "loss": null, "nonfinite": {"loss": "nan"}}`; `load_metrics` undoes this. A plain null
means unknown.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llamajax.errors import UserError, say
from llamajax.monitoring.tensorboard import TensorBoard

METRICS = "metrics.jsonl"
# These depend on the machine, the clock and the disk; all else in a row is the same in each run.
MEASURED = frozenset(
    (
        "time_s", "step_time_s", "data_wait_s", "tokens_per_s", "mfu_full", "mfu_causal",
        "memory_bytes", "peak_memory_bytes", "failed_checkpoints",
    )
)  # fmt: skip
_NONFINITE = "nonfinite"


def _plain(value: Any) -> Any:
    """A NumPy scalar as the Python number of the same value; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def encode_row(row: Mapping[str, Any]) -> str:
    """One line of the file, without its end. float32 values keep their exact value as a double."""
    plain = {key: _plain(value) for key, value in row.items()}
    odd = {k: v for k, v in plain.items() if isinstance(v, float) and not math.isfinite(v)}
    if odd:
        plain |= dict.fromkeys(odd)
        plain[_NONFINITE] = {key: repr(value) for key, value in odd.items()}
    return json.dumps(plain, allow_nan=False)


def decode_row(line: str) -> dict[str, Any] | None:
    """The row of one line, or None where the line is not a whole row (a killed writer's last)."""
    try:
        row = json.loads(line)
        if not isinstance(row["step"], int):
            return None
        return row | {key: float(text) for key, text in row.pop(_NONFINITE, {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []


def load_metrics(workdir: Path) -> list[dict[str, Any]]:
    """All whole rows of a run in file order; none where nothing was logged yet."""
    rows = (decode_row(line) for line in _lines(Path(workdir) / METRICS))
    return [row for row in rows if row is not None]


def _kind(row: Mapping[str, Any]) -> str:
    return "eval" if "eval_loss" in row else "train"


def _rewind(path: Path, *, resume_step: int) -> list[dict[str, Any]]:
    """Atomically remove rows after `resume_step` and broken lines; returns the rows that stay."""
    lines = _lines(path)
    rows = [(line, decode_row(line)) for line in lines]
    if broken := sum(row is None for _, row in rows):
        say(f"warning: {path}: {broken} of {len(lines)} lines are not whole rows: left out")
    kept = [(line, row) for line, row in rows if row is not None and row["step"] <= resume_step]
    if len(kept) < len(lines) or (lines and not path.read_bytes().endswith(b"\n")):
        temporary = path.with_name(f"{METRICS}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line, _ in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    return [row for _, row in kept if row is not None]


def _newest(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    newest: dict[str, int] = {}
    for row in rows:
        newest[_kind(row)] = max(row["step"], newest.get(_kind(row), -1))
    return newest


class MetricsWriter:
    """Appends rows to `workdir/metrics.jsonl` and to `workdir/tensorboard/`.

    resume_step: the step that training continues from (0 at the start of a run): later rows are
    removed first, so that every step stands once. Not primary: does nothing at all. Rows that a
    full disk refuses stay in memory and are written, in order, with the first one that it takes.
    """

    def __init__(self, workdir: Path, *, tensorboard: bool, resume_step: int, primary: bool):
        self._descriptor: int | None = None
        self._board: TensorBoard | None = None
        self._warned = False
        self._refused: list[str] = []
        if not primary:
            return
        path = Path(workdir) / METRICS
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._newest = _newest(_rewind(path, resume_step=resume_step))
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; choose a --workdir that is writable and "
                "has free space"
            ) from None
        if tensorboard:
            self._board = TensorBoard(path.parent / "tensorboard", resume_step=resume_step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; it must have `step`, and is an evaluation's if it has `eval_loss`.

        A row whose step already stands in the file (of the same kind) is not written again, so an
        evaluation may be repeated after a resume.
        """
        if self._descriptor is None:
            return
        step, kind = int(row["step"]), _kind(row)
        if step <= self._newest.get(kind, -1):
            return
        self._newest[kind] = step
        self._refused.append(f"{encode_row(row)}\n")
        self._write_refused()
        if self._board is not None:
            self._to_board(step, row)

    def close(self) -> None:
        """Release the files."""
        if self._descriptor is not None:
            self._write_refused()
            os.close(self._descriptor)
            self._descriptor = None
            if self._refused:
                say(f"warning: {METRICS} lacks the last {len(self._refused)} rows")
        if self._board is not None:
            self._board.close()
            self._board = None

    def _write_refused(self) -> None:
        try:
            if self._refused:
                append_whole(self._descriptor, "".join(self._refused).encode())
            self._refused.clear()
        except OSError as error:
            self._warn(f"rows of {METRICS} wait in memory: {error.strerror}")

    def _to_board(self, step: int, row: Mapping[str, Any]) -> None:
        assert self._board is not None
        numbers = {key: _plain(value) for key, value in row.items() if key != "step"}
        try:
            self._board.write(
                step, {k: float(v) for k, v in numbers.items() if isinstance(v, int | float)}
            )
        except OSError as error:
            self._warn(f"tensorboard/ is no longer written: {error.strerror}")
            self._board.close()
            self._board = None

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            say(f"warning: {message}; training goes on")


def append_whole(descriptor: int, data: bytes) -> None:
    """Append all of `data` to a file, or none of it: a full disk takes a part and then refuses.

    Raises OSError.
    """
    end = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, data)
        if written < len(data):
            os.write(descriptor, data[written:])
    except OSError:
        os.ftruncate(descriptor, end)
        raise
