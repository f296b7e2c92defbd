"""A bar for people at a terminal, lines for logs, nothing for everybody else."""

import io

import pytest

from llamajax.monitoring import Progress
from llamajax.monitoring.progress import format_count, format_duration, format_row

ROW = {
    "loss": 3.4123, "learning_rate": 3e-4, "grad_norm": 0.912, "tokens_per_s": 12345.0,
    "mfu_full": 0.4123, "step_time_s": 1.0,
}  # fmt: skip


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown_on(stream, total_steps=300, start_step=0, mode="auto", primary=True, **options):
    return Progress(
        total_steps=total_steps, start_step=start_step, mode=mode, primary=primary, stream=stream,
        **options,
    )  # fmt: skip


def test_durations_and_counts():
    durations = {0: "0s", 59.6: "1m00s", 192: "3m12s", 18420: "5h07m", 1051200: "12d04h"}
    assert {seconds: format_duration(seconds) for seconds in durations} == durations
    counts = {0: "0", 870: "870", 999.6: "1.00k", 12345: "12.3k", 999_600: "1.00M"}
    counts |= {70_553_706_496: "70.6B", 15e12: "15.0T", 2e16: "20000T"}
    assert {number: format_count(number) for number in counts} == counts


def test_a_line_in_a_log():
    stream = io.StringIO()
    progress = shown_on(stream, start_step=119)
    progress.show({"step": 120, **ROW})
    progress.show({"step": 120, "eval_loss": 3.5, "eval_perplexity": 33.12})
    progress.close()
    assert stream.getvalue() == (
        "step 120/300  loss 3.412  lr 3.0e-04  grad 0.91  12.3k tok/s  mfu 41.2 %  eta 3m00s\n"
        "step 120/300  eval loss 3.500  perplexity 33.12\n"
    )


def test_what_is_unknown_is_left_out():
    row = {"loss": 1.0, "mfu_full": None, "grad_norm": float("nan")}
    assert format_row(row) == "loss 1.000  grad nan"


@pytest.mark.parametrize(
    ("steps", "every_s", "num_lines", "first", "last"),
    [(100, 0.3, 1 + 24 + 1, "1m39s", "0s"), (1000, 2.0, 1000, "16m39s", "0s")],
)
def test_lines_come_once_a_second_with_the_time_left(steps, every_s, num_lines, first, last):
    """The first line has the step time of its row, later ones the wall clock; the last comes."""
    stream, now = io.StringIO(), [0.0]
    progress = shown_on(stream, total_steps=steps, mode="lines", clock=lambda: now[0])
    for step in range(1, steps + 1):
        now[0] += every_s
        progress.show({"step": step, "step_time_s": 1.0})
    lines = stream.getvalue().splitlines()
    assert len(lines) == num_lines
    assert lines[0] == f"step 1/{steps}    eta {first}"
    assert lines[-1] == f"step {steps}/{steps}    eta {last}"
    if every_s == 2.0:
        assert lines[199].endswith("eta 26m40s")


def test_a_bar_on_a_terminal():
    stream = Terminal()
    progress = shown_on(stream, start_step=100)
    progress.show({"step": 120, **ROW})
    progress.note("checkpoint saved")
    progress.close()
    for text in ("100/300", "120/300", "loss 3.412", "eta 3m00s", "\rcheckpoint saved\n"):
        assert text in stream.getvalue()


@pytest.mark.parametrize(("mode", "primary"), [("none", True), ("bar", False), ("lines", False)])
def test_nothing_is_shown_where_none_is_wanted(mode, primary):
    stream = Terminal()
    progress = shown_on(stream, mode=mode, primary=primary)
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
