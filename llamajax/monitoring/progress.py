"""Progress for people: a live view or a bar on a terminal, plain lines in a log.

All of it goes to stderr; stdout stays free for what a verb prints as its result.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

from llamajax.errors import say
from llamajax.monitoring.jsonl import is_evaluation
from llamajax.monitoring.log_copy import LogCopy
from llamajax.monitoring.row_format import Pace, format_duration, format_row
from llamajax.verbs import Output

_BYTES_LINE_EVERY_S = 10.0


class Progress:
    """Shows the rows of a run while it goes on: a live view on a terminal, aligned lines elsewhere.

    total_steps, start_step: steps of the whole run, and done before this process began. mode:
    config key `monitoring.progress`. title: names the run. mfu_full in rows is a fraction.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        start_step: int,
        mode: Literal["auto", "bar", "lines", "none"] = "auto",
        title: str = "",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        stream = sys.stderr if stream is None else stream
        self._log = stream if isinstance(stream, LogCopy) else None
        self._screen = self._log.stream if self._log else stream
        self._total, self._silent = total_steps, mode == "none"
        self._pace = Pace(total_steps=total_steps, start_step=start_step, clock=clock)
        self._announced, self._view = False, None
        if mode == "bar" or (mode == "auto" and self._screen.isatty()):
            # rich takes 0.1 s to import, and `benchmarks/` runs where it is not installed
            from llamajax.monitoring.live_view import LiveView, can_draw

            if mode == "bar" or can_draw(self._screen):
                self._view = LiveView(self._screen, title=title, pace=self._pace)
                if self._log:  # the file gets lines as they are
                    self._log.stream = self._view.above

    def show(self, row: Mapping[str, Any]) -> None:
        """Show one row of metrics, of a training step or of an evaluation."""
        if self._silent:
            return
        step, left = int(row["step"]), ""
        if not is_evaluation(row):
            self._pace.add(row)
            left = f"  left {format_duration(self._pace.left_s()):>6}"
        self._line(f"step {step:>{len(str(self._total))}}/{self._total}  {format_row(row)}{left}")
        if self._view:
            self._view.show(row)
        if not self._announced and self._pace.rows > 1 and step < self._total:
            self._announced = True
            self.note(self._pace.announcement())

    def set_cell(self, label: str, value: str) -> None:
        """Show a value in the live view that is in no training row, such as the last checkpoint."""
        if self._view:
            self._view.set_cell(label, value)

    def note(self, text: str) -> None:
        """Print one line of text, above the live view if there is one."""
        if not self._silent:
            stream = self._log or (self._view.above if self._view else self._screen)
            print(text, file=Output(stream, raises=False), flush=True)

    def close(self) -> None:
        """Leave the live view as it is."""
        if self._view:
            self._view.close()
            self._view = None
            if self._log:
                self._log.stream = self._screen

    def _line(self, text: str) -> None:
        """Write a row as a line: to the log with its time, and where there is no view, too."""
        if self._log:
            self._log.add(text)
        if not self._view:
            screen = Output(self._screen, raises=False)
            print(f"{time.strftime('%H:%M:%S')}  {text}", file=screen, flush=True)


class BytesProgress:
    """Shows bytes done: a bar on a terminal, a line every ten seconds elsewhere, for each phase."""

    def __init__(self) -> None:
        self.total = 0
        self._phase, self._bar = "", None
        self._start_s = self._line_s = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of a phase are done."""
        self.total = total
        if phase != self._phase:
            from tqdm import tqdm  # here, as `benchmarks/` runs where it is not installed

            self.close()
            self._phase, self._start_s = phase, time.monotonic()
            self._line_s = self._start_s
            self._bar = tqdm(total=total, desc=phase, unit="B", unit_scale=True, disable=None)
        if not self._bar.disable:
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._line_s > _BYTES_LINE_EVERY_S:
            self._line_s = time.monotonic()
            rate = done / (self._line_s - self._start_s)
            left_s = (total - done) / max(rate, 1.0)
            amount = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB"
            say(f"{phase}: {amount}, {rate / 1e6:.1f} MB/s, {left_s:,.0f} s left")

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        if self._bar is not None:
            self._bar.close()
