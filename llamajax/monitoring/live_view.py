"""The live view of a run on a terminal, drawn by rich below what is printed meanwhile.

Training never waits for it: rows are kept, a thread draws them twice a second, and another one
writes what is drawn (`LogCopy`). A terminal that refuses output loses the view, nothing else. The
cursor stays visible, so that a process which is killed has nothing to restore.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llamajax.monitoring.jsonl import is_evaluation
from llamajax.monitoring.row_format import Pace, format_cells, format_duration
from llamajax.verbs import Output

_DRAWN_PER_S = 2
_BLOCKS = "▁▂▃▄▅▆▇█"
_MOST_LOSSES = 1024  # kept for the curve; more are averaged in pairs
_CELL_WIDTH = 24


def can_draw(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that can move its cursor and show block characters."""
    encoding = (getattr(stream, "encoding", None) or "").lower()
    return (
        stream.isatty() and encoding.startswith("utf") and not Console(file=stream).is_dumb_terminal
    )


class LiveView:
    """Draws progress, loss curve and newest values on a terminal until `close`.

    above: takes the lines that are to appear above the view. title: names the run.
    """

    def __init__(self, screen: TextIO, *, title: str, pace: Pace):
        self._title, self._pace = title, pace
        self._row: Mapping[str, Any] = {}
        self._cells: dict[str, str] = {}
        self._losses: list[tuple[int, float]] = []
        # An escape sequence in a file would be what FORCE_COLOR asks for; here it is a terminal.
        console = Console(file=Output(screen, raises=False), force_terminal=True)
        self._live = Live(
            self,
            console=console,
            refresh_per_second=_DRAWN_PER_S,
            redirect_stdout=False,
            redirect_stderr=screen is sys.stderr,
            vertical_overflow="crop",
        )
        self._live.start(refresh=True)
        console.show_cursor(True)
        self.above = FileProxy(console, screen)

    def show(self, row: Mapping[str, Any]) -> None:
        """Take over a row's values; those of an evaluation stay until the next one."""
        if is_evaluation(row):
            for name, value in row.items():
                if name.startswith("eval_loss") or name.endswith("/accuracy"):
                    label = name.removeprefix("task/").replace("_", " ").replace("/", " ")
                    self.set_cell(label, f"{value:.3f} at {row['step']:,}")
            return
        self._row = row
        if math.isfinite(row.get("loss") or math.nan):
            self._losses.append((row["step"], row["loss"]))
        if len(self._losses) > _MOST_LOSSES:
            pairs = zip(self._losses[::2], self._losses[1::2], strict=False)
            self._losses = [(b, (x + y) / 2) for (_, x), (b, y) in pairs]

    def set_cell(self, label: str, value: str) -> None:
        """Show a value that is in no training row."""
        self._cells[label] = value

    def close(self) -> None:
        """Draw the last values and leave them on the screen."""
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, row, total = options.max_width, self._row, max(1, self._pace.total_steps)
        step = int(row.get("step", self._pace.start_step))
        elapsed = f"{format_duration(self._pace.elapsed_s)} elapsed"
        left_s = self._pace.left_s()
        left = "" if left_s is None else f"  {format_duration(left_s)} left"
        numbers = f"{step:,}/{total:,}  {step / total:4.0%}  {elapsed}{left}"
        title = Text(self._title, "bold", overflow="ellipsis", no_wrap=True)
        title.truncate(max(4, width // 4), overflow="ellipsis")
        head = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 1, None):
            head.add_column(ratio=ratio, no_wrap=True)
        bar = ProgressBar(total=total, completed=step, finished_style="green")
        head.add_row(title, bar, Text(numbers))
        yield head
        if row.get("loss") is not None:
            yield self._curve(row["loss"], width)
        columns = max(1, min(6, width // _CELL_WIDTH))
        grid = Table.grid(padding=(0, 1), expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        cells = [*format_cells(row), *self._cells.items()]
        texts = [Text.assemble((f"{label} ", "dim"), value) for label, value in cells]
        for first in range(0, len(texts), columns):
            grid.add_row(*texts[first : first + columns])
        yield grid

    def _curve(self, loss: float, width: int) -> Text:
        """Return the loss and its curve over the steps of this process."""
        parts = [("loss ", "dim"), (f"{loss:.3f}", "bold"), "  "]
        if len(self._losses) > 1:
            values = [y for _, y in self._losses]
            ends = f"{min(values):.2f} to {max(values):.2f}"
            room = max(8, width - len(f"loss {loss:.3f}    {ends}"))
            parts += [(curve(self._losses, room), "cyan"), f"  {ends}"]
        return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def curve(points: list[tuple[int, float]], width: int) -> str:
    """Return points (x rising, finite y) as `width` blocks at most, each the mean of its part."""
    first, last = points[0][0], points[-1][0]
    parts: dict[int, list[float]] = {}
    for x, y in points:
        parts.setdefault((x - first) * (width - 1) // max(1, last - first), []).append(y)
    means = [sum(part) / len(part) for part in parts.values()]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((y - low) * scale)] for y in means)
