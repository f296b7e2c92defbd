"""`metrics.jsonl`: one row a logged step, and the same numbers for other sinks."""

import collections
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamajax.errors import UserError, say
from llamajax.files import write_file
from llamajax.monitoring.jsonl import RowFile, decode_row, is_evaluation, read_lines, read_rows
from llamajax.monitoring.sinks import PERF, SinkThread, close_sinks

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
# A sink may keep rows in memory for a while (wandb does for 15 s), which a killed process loses.
_SENT_AGAIN_S = 60.0
# These depend on the machine, the clock and the disk; all else in a row is the same in each run.
MEASURED = frozenset((*PERF, "failed_checkpoints", "sink_dropped_rows"))


def load_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Return all whole rows of a run in file order; none where nothing was logged yet."""
    return read_rows(Path(workdir) / METRICS)


def _kind(row: Mapping[str, Any]) -> str:
    """Return what a step has one row of: one for training, one evaluation, one for each prompt."""
    return "eval" if is_evaluation(row) else f"prompt {row['index']}" if "prompt" in row else ""


def _rewind(path: Path, *, resume_step: int) -> list[dict[str, Any]]:
    """Remove rows after `resume_step` and broken lines atomically; return the rows that stay."""
    lines = read_lines(path)
    rows = [(line, decode_row(line)) for line in lines]
    if broken := sum(row is None for _, row in rows):
        say(f"warning: {path}: {broken} of {len(lines)} lines are not whole rows: left out")
    kept = [(line, row) for line, row in rows if row is not None and row["step"] <= resume_step]
    if len(kept) < len(lines):
        write_file(path, "".join(f"{line}\n" for line, _ in kept), durable=True)
    return [row for _, row in kept]


class MetricsWriter:
    """Appends rows to `workdir/metrics.jsonl`, and passes them to the sinks, which it closes.

    resume_step: the step that training continues from (0 at the start of a run). Later rows are
    removed first, so that the file holds every step once. Not primary: does nothing at all. Rows
    that a full disk refuses are written, in order, with the first one that it takes. open_sinks:
    given the step after which what the sinks hold is replaced. file: another name.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        resume_step: int,
        primary: bool,
        file: str = METRICS,
        open_sinks: Callable[[int], Sequence[SinkThread]] = lambda _: (),
    ):
        self._file: RowFile | None = None
        self._sinks: Sequence[SinkThread] = ()
        self._newest: collections.defaultdict[str, int] = collections.defaultdict(lambda: -1)
        if not primary:
            return
        path = Path(workdir) / file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = _rewind(path, resume_step=resume_step)
            for row in rows:
                self._newest[_kind(row)] = max(row["step"], self._newest[_kind(row)])
            with path.open("ab"):
                self._file = RowFile(path)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; choose a --workdir that is writable and "
                "has free space"
            ) from None
        self._file.begin()
        last_s = rows[-1].get("time_s", 0.0) if rows else 0.0
        again = [row for row in rows if row.get("time_s", 0.0) > last_s - _SENT_AGAIN_S]
        self._sinks = open_sinks(again[0]["step"] - 1 if again else resume_step)
        for row in again:
            self.pass_on(row)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; it must have `step`.

        A step that the file already holds (of the same kind) is not written again, so that an
        evaluation may be repeated after a resume.
        """
        step, kind = int(row["step"]), _kind(row)
        if self._file is None or step <= self._newest[kind]:
            return
        self._newest[kind] = step
        if dropped := sum(sink.dropped for sink in self._sinks):
            row = {**row, "sink_dropped_rows": dropped}
        self._file.add(row)
        self.pass_on(row)

    def pass_on(self, row: Mapping[str, Any]) -> None:
        """Pass a row to the sinks alone."""
        for sink in self._sinks:
            sink.write(row)

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Pass a text to the sinks that have room for texts."""
        for sink in self._sinks:
            sink.write_text(tag, text, step)

    def close(self) -> None:
        """Release the files; warn of rows that a full disk still refuses."""
        if self._file is not None:
            self._file.close()
            self._file = None
        close_sinks(self._sinks)
        self._sinks = ()
