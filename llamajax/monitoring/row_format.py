"""Numbers of a run as people read them: durations, counts, rows, the time that is left."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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


def format_size(size: float) -> str:
    """Format bytes: 3.5 MiB, 24.3 GiB."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def format_row(row: Mapping[str, Any]) -> str:
    """Format the numbers of a metrics row that people read; those of several rows are aligned."""
    formats: dict[str, Callable[[Any], str]] = {
        "loss": "loss {:6.3f}".format,
        "eval_loss": "eval loss {:.3f}".format,
        "eval_perplexity": "perplexity {:.2f}".format,
        "ema_loss": "average's loss {:.3f}".format,
        "learning_rate": "lr {:.1e}".format,
        "grad_norm": "grad {:5.2f}".format,
        "tokens_per_s": lambda rate: f"{format_count(rate):>5} tok/s",
        "mfu_full": lambda mfu: f"mfu {100 * mfu:4.1f} %",
    }
    parts = [shown(row[key]) for key, shown in formats.items() if row.get(key) is not None]
    parts += [f"{name[10:]} {row[name]:.3f}" for name in row if name.startswith("eval_loss/")]
    for name in row:
        if name.startswith("task/") and name.endswith("/accuracy"):
            parts.append(f"{name.split('/')[1]} accuracy {row[name]:.3f}")
    return "  ".join(parts)


def format_cells(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield label and value of what the live view shows of a training row besides its loss."""
    formats: dict[str, tuple[str, Callable[[Any], str]]] = {
        "learning_rate": ("lr", "{:.2e}".format),
        "grad_norm": ("grad norm", "{:.3g}".format),
        "tokens_per_s": ("tokens/s", format_count),
        "mfu_full": ("MFU", "{:.1%}".format),
        "step_time_s": ("step", format_seconds),
        "data_wait_s": ("data wait", format_seconds),
        "peak_memory_bytes": ("peak memory", lambda sizes: f"{max(sizes) / 2**30:.1f} GiB"),
        "tokens_seen": ("tokens", format_count),
        "skipped_updates": ("skipped", str),
    }
    for key, (label, formatted) in formats.items():
        if row.get(key) is not None:
            yield label, formatted(row[key])


def format_seconds(seconds: float) -> str:
    """Format a short time: 3.21 s, 812 ms, 0 ms."""
    return f"{seconds:.2f} s" if seconds >= 0.9995 else f"{1000 * seconds:.0f} ms"


class Pace:
    """Estimates the time left from the wall time between rows, evaluations and saves included.

    start_step: done before this process began. rows: how many were added. The first one has only
    compilation before it, so its own step time is used until the second one.
    """

    def __init__(self, *, total_steps: int, start_step: int, clock: Callable[[], float]):
        self.total_steps, self.start_step, self.rows = total_steps, start_step, 0
        self._clock, self._began_s = clock, clock()
        self._step, self._at_s = start_step, self._began_s  # of the last row
        self._seconds_a_step: float | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a training row into account."""
        now, step = self._clock(), int(row["step"])
        if self.rows == 0:
            wait_s = row.get("data_wait_s") or 0.0
            self._seconds_a_step = (row.get("step_time_s") or 0.0) + wait_s
        elif step > self._step:
            newest = (now - self._at_s) / (step - self._step)
            weight = 1.0 if self.rows == 1 else _SMOOTHING
            self._seconds_a_step += weight * (newest - self._seconds_a_step)
        self._step, self._at_s, self.rows = step, now, self.rows + 1

    @property
    def elapsed_s(self) -> float:
        """Seconds since this was made."""
        return self._clock() - self._began_s

    def left_s(self) -> float | None:
        """Return the seconds left from now on; None before the first row."""
        if self._seconds_a_step is None:
            return None
        left_s = self._seconds_a_step * max(0, self.total_steps - self._step)
        return max(0.0, left_s - (self._clock() - self._at_s))

    def announcement(self) -> str:
        """Describe how long the rest of the run takes."""
        left_s, steps = self.left_s() or 0.0, self.total_steps - self._step
        end = time.strftime("%a %H:%M", time.localtime(time.time() + left_s))
        pace = format_seconds(self._seconds_a_step or 0.0)
        return f"pace     {pace} a step: {steps:,} more take {format_duration(left_s)}, until {end}"
