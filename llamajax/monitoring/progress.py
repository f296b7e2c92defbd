"""Progress for people: a bar with the time left on a terminal, plain lines in a log.

All of it goes to stderr; stdout stays free for what a verb prints as its result.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

from llamajax.errors import say
from llamajax.verbs import Output

_LINE_EVERY_S = 1.0
_BYTES_LINE_EVERY_S = 10.0
# Weight of the newest interval in the estimate of the time left.
_SMOOTHING = 0.1


def format_duration(seconds: float) -> str:
    """Format seconds for people: 8s, 3m12s, 5h07m, 12d04h."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{h}h{m:02d}m"
    return f"{m}m{s:02d}s" if minutes else f"{s}s"


def format_count(number: float) -> str:
    """Format a count to three digits: 870, 12.3k, 1.24M, 70.6B."""
    if abs(number) < 999.5:
        return f"{number:.0f}"
    for unit in "kMBT":
        number /= 1000
        if abs(number) < 999.5 or unit == "T":
            break
    decimals = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{decimals}f}{unit}"


def format_row(row: Mapping[str, Any]) -> str:
    """Format the numbers of a metrics row that people read, in the order they read them."""
    formats = {
        "loss": "loss {:.3f}",
        "eval_loss": "eval loss {:.3f}",
        "eval_perplexity": "perplexity {:.2f}",
        "learning_rate": "lr {:.1e}",
        "grad_norm": "grad {:.2f}",
        "tokens_per_s": "{} tok/s",
        "mfu_full": "mfu {:.1f} %",
    }
    shown = {key: row[key] for key in formats if row.get(key) is not None}
    if "tokens_per_s" in shown:
        shown["tokens_per_s"] = format_count(shown["tokens_per_s"])
    if "mfu_full" in shown:
        shown["mfu_full"] *= 100
    return "  ".join(formats[key].format(value) for key, value in shown.items())


def _bar(**options: Any) -> Any:
    """Return a bar of tqdm, imported here: `benchmarks/` runs where it is not installed."""
    from tqdm import tqdm

    return tqdm(**options)


class Progress:
    """Shows the rows of a run while it goes on.

    total_steps, start_step: steps of the whole run, and done before this process began. mode:
    config key `monitoring.progress`. Not primary: shows nothing. mfu_full in rows is a fraction.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        start_step: int,
        mode: Literal["auto", "bar", "lines", "none"],
        primary: bool,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = Output(sys.stderr if stream is None else stream, raises=False)
        self._clock, self._total = clock, total_steps
        self._silent = mode == "none" or not primary
        self._step, self._at_s = start_step, clock()  # of the last row
        self._seconds_a_step: float | None = None
        self._line_s: float | None = None
        has_bar = mode == "bar" or (mode == "auto" and self._stream.isatty())
        self._bar = _bar(
            total=total_steps,
            initial=start_step,
            unit="step",
            file=self._stream,
            dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} |{bar:12}|{postfix}",
            disable=self._silent or not has_bar,
        )

    def show(self, row: Mapping[str, Any]) -> None:
        """Show one row of metrics: a training step's moves the bar, an evaluation's is a line.

        In a log, training lines come at most once a second; the first and the last always come.
        """
        if self._silent:
            return
        step = int(row["step"])
        if "eval_loss" in row:
            self.note(f"step {step}/{self._total}  {format_row(row)}")
            return
        text = f"{format_row(row)}  eta {self._eta(step, row)}"
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.n = step
            self._bar.refresh()
            return
        now = self._clock()
        if self._line_s is None or now - self._line_s >= _LINE_EVERY_S or step >= self._total:
            self._line_s = now
            self.note(f"step {step}/{self._total}  {text}")

    def note(self, text: str) -> None:
        """Print one line of text without tearing the bar."""
        if not self._silent:
            self._bar.clear()
            print(text, file=self._stream, flush=True)
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        self._bar.close()

    def _eta(self, step: int, row: Mapping[str, Any]) -> str:
        """Return the time left, from the wall time between rows, with evaluations and checkpoints.

        The first row has only compilation before it, so its own step time is used.
        """
        now = self._clock()
        if self._seconds_a_step is None:
            self._seconds_a_step = row.get("step_time_s") or 0.0
        elif step > self._step:
            newest = (now - self._at_s) / (step - self._step)
            self._seconds_a_step += _SMOOTHING * (newest - self._seconds_a_step)
        self._step, self._at_s = step, now
        return format_duration(self._seconds_a_step * max(0, self._total - step))


class BytesProgress:
    """Shows bytes done: a bar on a terminal, a line every ten seconds elsewhere, for each phase."""

    def __init__(self) -> None:
        self.total = 0
        self._phase = ""
        self._bar = _bar(disable=True)
        self._start_s = self._line_s = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of a phase are done."""
        self.total = total
        if phase != self._phase:
            self.close()
            self._phase, self._start_s = phase, time.monotonic()
            self._line_s = self._start_s
            self._bar = _bar(total=total, desc=phase, unit="B", unit_scale=True, disable=None)
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
        self._bar.close()
