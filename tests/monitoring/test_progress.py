"""A live view for people at a terminal, lines for logs, nothing for everybody else."""

import io
import math
import os
import re
import subprocess
import sys

import pytest

from llamajax.errors import say
from llamajax.monitoring import Progress
from llamajax.monitoring.log_copy import LogCopy
from llamajax.monitoring.row_format import format_count, format_duration, format_row

ROW = {
    "loss": 3.4123, "learning_rate": 3e-4, "grad_norm": 0.912, "tokens_per_s": 12345.0,
    "mfu_full": 0.4123, "step_time_s": 1.0,
}  # fmt: skip


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def shown_on(stream, total_steps=300, start_step=0, **options):
    return Progress(total_steps=total_steps, start_step=start_step, stream=stream, **options)


def lines_of(stream):
    """The lines without their times."""
    return [re.sub(r"^\d\d:\d\d:\d\d  ", "", line) for line in stream.getvalue().splitlines()]


def test_numbers_as_people_read_them():
    durations = {0: "0s", 59.6: "1m00s", 192: "3m12s", 18420: "5h07m", 1051200: "12d04h"}
    assert {seconds: format_duration(seconds) for seconds in durations} == durations
    counts = {0: "0", 870: "870", 999.6: "1.00k", 12345: "12.3k", 999_600: "1.00M"}
    counts |= {70_553_706_496: "70.6B", 15e12: "15.0T", 2e16: "20000T"}
    assert {number: format_count(number) for number in counts} == counts
    unknown = {"loss": 1.0, "mfu_full": None, "grad_norm": float("nan")}
    assert format_row(unknown) == "loss  1.000  grad   nan"


def test_lines_in_a_log_are_aligned():
    stream = io.StringIO()
    progress = shown_on(stream, start_step=8)
    progress.show({"step": 9, **ROW, "loss": 12.5, "tokens_per_s": 8.0})
    progress.show({"step": 120, **ROW})
    evaluation = {"step": 120, "eval_loss": 3.5, "eval_perplexity": 33.12}
    progress.show(evaluation | {"eval_loss/book": 2.5, "eval_tokens/book": 9})
    progress.close()
    assert all(
        re.match(r"\d\d:\d\d:\d\d  step", line) for line in stream.getvalue().splitlines()[:2]
    )
    first, second, pace, evaluated = lines_of(stream)
    assert first == (
        "step   9/300  loss 12.500  lr 3.0e-04  grad  0.91      8 tok/s  mfu 41.2 %  left  4m51s"
    )
    assert second == (
        "step 120/300  loss  3.412  lr 3.0e-04  grad  0.91  12.3k tok/s  mfu 41.2 %  left     0s"
    )
    assert pace.startswith("pace     0 ms a step: 180 more take 0s, until ")
    assert evaluated == "step 120/300  eval loss 3.500  perplexity 33.12  book 2.500"


def test_every_row_is_a_line_with_the_time_left():
    """The first has the step time of its row, the second the wall clock, later ones are smooth."""
    stream, now = io.StringIO(), [0.0]
    progress = shown_on(stream, total_steps=1000, mode="lines", clock=lambda: now[0])
    for step in range(1, 1001):
        now[0] += 2.0 if step < 500 else 3.0
        progress.show({"step": step, "step_time_s": 0.75, "data_wait_s": 0.25})
    first, second, pace, *others = lines_of(stream)
    assert len(others) == 998
    assert first.endswith("left 16m39s")
    assert second.endswith("left 33m16s")
    assert pace.startswith("pace     2.00 s a step: 998 more take 33m16s, until ")
    assert others[495].endswith("left 16m44s")
    assert others[-300].endswith("left 14m57s")
    assert others[-1].endswith("left     0s")


@pytest.mark.parametrize("columns", [20, 80, 160])
def test_a_live_view_on_a_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    progress = shown_on(stream, start_step=100, title="run")
    for step in range(101, 121):
        progress.show({"step": step, **ROW, "loss": math.nan if step == 110 else 300.0 / step})
    progress.show({"step": 120, "eval_loss": math.inf, "eval_perplexity": math.inf})
    progress.set_cell("restarts", "2")
    progress.note("warning: [red] text")
    progress.close()
    text = stream.getvalue()
    assert not re.search(r"\x1b\[[\d;]*3\dm", text)  # no color
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is there
    plain = re.sub(r"\x1b\[[\d;?]*\w", "", text.replace("\r", "\n"))
    assert "warning: [red] text\n" in plain
    last = plain.splitlines()[-{20: 10, 80: 5, 160: 4}[columns] :]
    assert all(len(line) <= columns for line in last)
    expected = ["loss 2.500  █"] if columns == 20 else [
        "run", "━", "120/300   40%", "left", "loss 2.500  █", "▁  2.50 to 2.97", "lr 3.00e-04",
        "grad norm 0.912", "tokens/s 12.3k", "MFU 41.2%", "step 1.00 s", "restarts 2",
        "eval loss inf at 120",
    ]  # fmt: skip
    assert [part for part in expected if part not in "\n".join(last)] == []


def test_a_log_has_lines_while_the_terminal_has_the_view(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    log = LogCopy(tmp_path / "log")
    with log:
        log.begin()
        progress = shown_on(sys.stderr)
        progress.show({"step": 1, **ROW})
        say("warning: from elsewhere")
        progress.note("warning: from training")
        progress.close()
        say("finished")
    lines = [line[21:] for line in (tmp_path / "log").read_text().splitlines()]
    assert lines[0].startswith("step   1/300  loss  3.412  ")
    assert lines[1:] == ["warning: from elsewhere", "warning: from training", "finished"]
    assert all(line in terminal.getvalue() for line in lines[1:])
    assert "step   1/300" not in terminal.getvalue()


# Fills a terminal that nobody reads, then shows a run on it.
UNREAD = """
import os, sys
from pathlib import Path
from llamajax.errors import say
from llamajax.monitoring import Progress
from llamajax.monitoring.log_copy import LogCopy
os.set_blocking(2, False)
try:
    while True:
        os.write(2, b"x" * 64)
except BlockingIOError:
    os.set_blocking(2, True)
with LogCopy(Path(sys.argv[1])) as log:
    log.begin()
    progress = Progress(total_steps=3000, start_step=0, mode=sys.argv[2], stream=sys.stderr)
    for step in range(1, 3001):
        progress.show({"step": step, "loss": 1.0})
        say("from elsewhere")
    progress.close()
    say("finished")
"""


@pytest.mark.parametrize("mode", ["bar", "lines"])
def test_a_terminal_that_does_not_read_holds_up_nothing(mode, tmp_path):
    leader, terminal = os.openpty()
    try:
        command = [sys.executable, "-c", UNREAD, str(tmp_path / "log"), mode]
        done = subprocess.run(command, stderr=terminal, timeout=100, check=False)
    finally:
        os.close(terminal)
        os.close(leader)
    assert done.returncode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert len([line for line in lines if " step " in line]) == 3000
    assert lines[-1].endswith("finished")


@pytest.mark.parametrize("encoding", ["latin-1", "dumb"])
def test_a_terminal_that_cannot_draw_gets_lines(encoding, monkeypatch):
    monkeypatch.setenv("TERM", "dumb" if encoding == "dumb" else "xterm")
    stream = Terminal()
    stream.__class__ = type("Old", (Terminal,), {"encoding": encoding.replace("dumb", "utf-8")})
    progress = shown_on(stream)
    progress.show({"step": 1, **ROW})
    progress.close()
    assert "\x1b" not in stream.getvalue()
    assert lines_of(stream)[0].startswith("step   1/300  loss  3.412")


def test_nothing_is_shown_where_none_is_wanted():
    stream = Terminal()
    progress = shown_on(stream, mode="none")
    progress.show({"step": 1, **ROW})
    progress.note("text")
    progress.close()
    assert stream.getvalue() == ""


class Refusing(io.StringIO):
    """A terminal that is gone, or a log on a full disk."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("mode", ["bar", "lines"])
def test_a_stream_that_refuses_ends_nothing(mode):
    progress = shown_on(Refusing(), mode=mode)
    progress.show({"step": 1} | ROW)
    progress.note("warning: something")
    progress.show({"step": 1, "eval_loss": 1.0})
    progress.close()
