"""A bar for people at a terminal, lines for logs, silence for everybody else."""

import io

import pytest

from llamajax.monitoring import Progress
from llamajax.monitoring.progress import format_count, format_duration, format_row

ROW = {
    "loss": 3.4123,
    "learning_rate": 3e-4,
    "grad_norm": 0.912,
    "tokens_per_s": 12345.0,
    "mfu_full": 0.4123,
    "step_time_s": 1.0,
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (192, "3m12s"), (18420, "5h07m"), (1051200, "12d04h")],
)
def test_durations(seconds: float, text: str):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (870, "870"), (999.6, "1.00k"), (12345, "12.3k"), (999_600, "1.00M"),
     (70_553_706_496, "70.6B"), (15e12, "15.0T"), (2e16, "20000T")],
)  # fmt: skip
def test_counts(number: float, text: str):
    assert format_count(number) == text


def test_a_line_in_a_log():
    stream = io.StringIO()
    progress = Progress(total_steps=300, start_step=119, mode="auto", primary=True, stream=stream)
    progress.show({"step": 120, **ROW})
    progress.show({"step": 120, "eval_loss": 3.5, "eval_perplexity": 33.12})
    progress.close()
    assert stream.getvalue() == (
        "step 120/300  loss 3.412  lr 3.0e-04  grad 0.91  12.3k tok/s  mfu 41.2 %  eta 3m00s\n"
        "step 120/300  eval loss 3.500  perplexity 33.12\n"
    )


def test_what_is_unknown_is_left_out():
    assert format_row({"loss": 1.0, "mfu_full": None, "grad_norm": float("nan")}) == (
        "loss 1.000  grad nan"
    )


def test_lines_come_at_most_once_a_second_but_the_last_comes():
    stream, now = io.StringIO(), [0.0]
    progress = Progress(
        total_steps=100, start_step=0, mode="lines", primary=True, stream=stream,
        clock=lambda: now[0],
    )  # fmt: skip
    for step in range(1, 101):
        now[0] += 0.3
        progress.show({"step": step, **ROW})
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 1/100 ")
    assert lines[-1].startswith("step 100/100 ")
    assert len(lines) == 1 + 24 + 1


def test_time_left_follows_the_wall_clock():
    stream, now = io.StringIO(), [0.0]
    progress = Progress(
        total_steps=1000, start_step=0, mode="lines", primary=True, stream=stream,
        clock=lambda: now[0],
    )  # fmt: skip
    for step in range(1, 201):
        now[0] += 2.0
        progress.show({"step": step, "step_time_s": 1.0})
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("eta 16m39s")
    assert lines[-1].endswith("eta 26m40s")


def test_a_bar_on_a_terminal():
    stream = Terminal()
    progress = Progress(total_steps=300, start_step=100, mode="auto", primary=True, stream=stream)
    progress.show({"step": 120, **ROW})
    progress.note("checkpoint saved")
    progress.close()
    text = stream.getvalue()
    assert "100/300" in text
    assert "120/300" in text
    assert "loss 3.412" in text
    assert "eta 3m00s" in text
    assert "\rcheckpoint saved\n" in text


@pytest.mark.parametrize(("mode", "primary"), [("none", True), ("bar", False), ("lines", False)])
def test_silence(mode: str, primary: bool):
    stream = Terminal()
    progress = Progress(total_steps=3, start_step=0, mode=mode, primary=primary, stream=stream)
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
def test_a_stream_that_refuses_ends_nothing(mode: str):
    progress = Progress(total_steps=9, start_step=0, mode=mode, primary=True, stream=Refusing())
    progress.show({"step": 1} | ROW)
    progress.note("warning: something")
    progress.show({"step": 1, "eval_loss": 1.0})
    progress.close()
