"""Every step stands once in metrics.jsonl, with every bit, whatever happens to the writer."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from llamajax.errors import UserError
from llamajax.monitoring import MetricsWriter, load_metrics


def writer(workdir: Path, *, resume_step: int = 0, **options) -> MetricsWriter:
    return MetricsWriter(
        workdir, **{"tensorboard": False, "primary": True, "resume_step": resume_step, **options}
    )


def write_steps(workdir: Path, steps: range, *, resume_step: int = 0) -> None:
    metrics = writer(workdir, resume_step=resume_step)
    for step in steps:
        metrics.write({"step": step, "loss": 1 / step})
        if step % 2 == 0:
            metrics.write({"step": step, "eval_loss": 2 / step, "eval_perplexity": 1.0})
    metrics.close()


def test_numbers_read_back_bit_for_bit(tmp_path: Path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, float(np.float32(0.1)), 3.0]
    metrics = writer(tmp_path)
    for step, value in enumerate(values, start=1):
        metrics.write({"step": step, "loss": value, "mfu_full": None})
    metrics.write({"step": np.int32(9), "loss": np.float32(0.1), "tokens_seen": np.int64(2**40)})
    metrics.close()
    rows = load_metrics(tmp_path)
    assert [row["loss"].hex() for row in rows[:-1]] == [value.hex() for value in values]
    assert rows[0]["mfu_full"] is None
    assert rows[-1] == {"step": 9, "loss": float(np.float32(0.1)), "tokens_seen": 2**40}


def test_what_is_not_finite_is_strict_json(tmp_path: Path):
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    metrics = writer(tmp_path)
    metrics.write({"step": 1, "loss": math.nan, "grad_norm": np.float32(np.inf), "z": -math.inf})
    metrics.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "z": None,
        "nonfinite": {"loss": "nan", "grad_norm": "inf", "z": "-inf"},
    }
    (row,) = load_metrics(tmp_path)
    assert math.isnan(row.pop("loss"))
    assert row == {"step": 1, "grad_norm": math.inf, "z": -math.inf}


def test_rows_are_there_at_once(tmp_path: Path):
    metrics = writer(tmp_path)
    metrics.write({"step": 1, "loss": 1.0})
    assert len(load_metrics(tmp_path)) == 1
    metrics.close()


@pytest.mark.parametrize("tail", ["", '{"step": 7, "lo', '{"step": 7}', "\0\0\0", "[1]\n", "\n"])
def test_resumed_runs_read_like_undisturbed_ones(tmp_path: Path, tail: str):
    write_steps(tmp_path / "whole", range(1, 9))
    write_steps(tmp_path / "cut", range(1, 7))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write(tail)
    write_steps(tmp_path / "cut", range(5, 9), resume_step=4)
    whole, cut = ((tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "cut"))
    assert cut == whole


def test_a_line_without_its_end_is_not_glued_to_the_next(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}')
    write_steps(tmp_path, range(2, 3), resume_step=1)
    assert [row["step"] for row in load_metrics(tmp_path)] == [1, 2, 2]


def test_rows_that_cannot_be_read_are_reported(tmp_path: Path, capsys):
    write_steps(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo\n{"step": 4}\n')
    writer(tmp_path, resume_step=4).close()
    assert [row["step"] for row in load_metrics(tmp_path)] == [1, 2, 2, 4]
    assert "metrics.jsonl: 1 of 5 lines are not whole rows" in capsys.readouterr().err


def test_starting_over_begins_an_empty_file(tmp_path: Path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 2))
    assert [row["step"] for row in load_metrics(tmp_path)] == [1]


def test_a_step_is_written_once_of_each_kind(tmp_path: Path):
    write_steps(tmp_path, range(1, 5))
    metrics = writer(tmp_path, resume_step=4)
    metrics.write({"step": 4, "eval_loss": 0.5})
    metrics.write({"step": 4, "loss": 0.5})
    metrics.close()
    kinds = [(row["step"], "eval_loss" in row) for row in load_metrics(tmp_path)]
    assert kinds == [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]


def test_other_processes_write_nothing(tmp_path: Path):
    metrics = writer(tmp_path / "run", primary=False, tensorboard=True)
    metrics.write({"step": 1})
    metrics.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("space_again", [True, False])
def test_rows_that_a_full_disk_refuses_are_written_when_it_has_space(
    space_again: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The disk takes half of a row, then nothing; later it may have space again."""
    metrics = writer(tmp_path)
    metrics.write({"step": 1, "loss": 1.0})
    real = os.write
    state = {"calls": 0}

    def full(descriptor: int, data: bytes) -> int:
        state["calls"] += 1
        if state["calls"] % 2 == 0:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        metrics.write({"step": 2, "loss": 1.0})
        metrics.write({"step": 3, "eval_loss": 1.0})
        metrics.write({"step": 3, "eval_loss": 2.0})  # stands already, in memory
        assert state["calls"] == 4
        if not space_again:
            metrics.close()
    metrics.write({"step": 4, "loss": 1.0})
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [1, 2, 3, 4] if space_again else [1]
    assert [json.loads(line)["step"] for line in lines] == steps
    warned = capsys.readouterr().err.splitlines()
    assert warned[0].endswith("metrics.jsonl: No space left on device; its lines are kept for "
                              "later, and training goes on")  # fmt: skip
    assert [line.count("eval_loss") for line in warned[1:]] == [1] * (not space_again)


def test_a_workdir_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: .*--workdir"):
        writer(tmp_path / "run")
    (tmp_path / "other" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl"):
        writer(tmp_path / "other")


def test_no_file_is_no_rows(tmp_path: Path):
    assert load_metrics(tmp_path) == []
