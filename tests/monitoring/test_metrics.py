"""Every step is in metrics.jsonl once, with every bit, and in TensorBoard, whatever happens."""

import json
import math
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from refusal import refused
from workdirs import read_rows

from llamajax.monitoring import MetricsWriter, load_metrics
from llamajax.monitoring.sinks import open_sinks


def writer(workdir, *, resume_step=0, tensorboard=False, primary=True):
    names = ("tensorboard",) if tensorboard else ()
    return MetricsWriter(
        workdir,
        primary=primary,
        resume_step=resume_step,
        open_sinks=lambda step: open_sinks(names, workdir, after_step=step, config={"a": 1}),
    )


def write_rows(workdir, *rows, resume_step=0):
    metrics = writer(workdir, resume_step=resume_step)
    for row in rows:
        metrics.write(row)
    metrics.close()
    return (workdir / "metrics.jsonl").read_text()


def write_steps(workdir, steps, *, resume_step=0):
    rows = []
    for step in steps:
        rows.append({"step": step, "loss": 1 / step})
        if step % 2 == 0:
            rows.append({"step": step, "eval_loss": 2 / step, "eval_perplexity": 1.0})
    return write_rows(workdir, *rows, resume_step=resume_step)


def test_numbers_read_back_bit_for_bit(tmp_path):
    assert load_metrics(tmp_path) == []
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, float(np.float32(0.1)), 3.0]
    rows = [{"step": n, "loss": v, "mfu_full": None} for n, v in enumerate(values, start=1)]
    numpy_row = {"step": np.int32(9), "loss": np.float32(0.1), "tokens_seen": np.int64(2**40)}
    write_rows(tmp_path, *rows, numpy_row)
    found = load_metrics(tmp_path)
    assert [row["loss"].hex() for row in found[:-1]] == [value.hex() for value in values]
    assert found[0]["mfu_full"] is None
    assert found[-1] == {"step": 9, "loss": float(np.float32(0.1)), "tokens_seen": 2**40}


def test_values_that_are_not_finite_are_strict_json(tmp_path):
    line = write_rows(
        tmp_path, {"step": 1, "loss": math.nan, "grad_norm": np.float32(np.inf), "z": -math.inf}
    )
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "grad_norm": None, "z": None,
        "nonfinite": {"loss": "nan", "grad_norm": "inf", "z": "-inf"},
    }  # fmt: skip
    (row,) = load_metrics(tmp_path)
    assert math.isnan(row.pop("loss"))
    assert row == {"step": 1, "grad_norm": math.inf, "z": -math.inf}


@pytest.mark.parametrize("tail", ["", '{"step": 7, "lo', '{"step": 7}', "\0\0\0", "[1]\n", "\n"])
@pytest.mark.parametrize("resume_step", [0, 4])
def test_resumed_runs_read_like_undisturbed_ones(tmp_path, resume_step, tail):
    whole = write_steps(tmp_path / "whole", range(1, 9))
    write_steps(tmp_path / "cut", range(1, 7))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write(tail)
    steps = range(resume_step + 1, 9)
    assert write_steps(tmp_path / "cut", steps, resume_step=resume_step) == whole


def test_a_line_without_its_end_is_not_glued_to_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}')
    write_steps(tmp_path, range(2, 3), resume_step=1)
    assert [row["step"] for row in load_metrics(tmp_path)] == [1, 2, 2]


def test_rows_that_cannot_be_read_are_reported(tmp_path, capsys):
    write_steps(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo\n{"step": 4}\n')
    write_rows(tmp_path, resume_step=4)
    assert [row["step"] for row in load_metrics(tmp_path)] == [1, 2, 2, 4]
    assert "metrics.jsonl: 1 of 5 lines are not whole rows" in capsys.readouterr().err


def test_a_step_is_written_once_of_each_kind(tmp_path):
    rows = write_steps(tmp_path, range(1, 5))
    again = ({"step": 4, "eval_loss": 0.5}, {"step": 4, "loss": 0.5})
    assert write_rows(tmp_path, *again, resume_step=4) == rows
    samples = [{"step": 4, "index": index, "prompt": "a"} for index in (0, 1, 0)]
    write_rows(tmp_path, *samples, resume_step=4)
    assert load_metrics(tmp_path)[-2:] == samples[:2]


def test_other_processes_write_nothing(tmp_path):
    metrics = writer(tmp_path / "run", primary=False, tensorboard=True)
    metrics.write({"step": 1})
    metrics.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("space_again", [True, False])
def test_rows_that_a_full_disk_refuses_are_written_when_it_has_space(
    space_again, tmp_path, monkeypatch, capsys
):
    """The disk takes half of a row, then nothing; later it may have space again."""
    metrics = writer(tmp_path)
    metrics.write({"step": 1, "loss": 1.0})
    assert len(load_metrics(tmp_path)) == 1  # at once
    real, calls = os.write, []

    def full(descriptor: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) % 2 == 0:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        metrics.write({"step": 2, "loss": 1.0})
        metrics.write({"step": 3, "eval_loss": 1.0})
        metrics.write({"step": 3, "eval_loss": 2.0})  # there already, in memory
        assert len(calls) == 4
        if not space_again:
            metrics.close()
    metrics.write({"step": 4, "loss": 1.0})
    metrics.close()
    steps = [1, 2, 3, 4] if space_again else [1]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == steps
    warned, *lost = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl: No space left on device; its lines are kept for later, and" in warned
    assert [line.count("eval_loss") for line in lost] == [1] * (not space_again)


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "run").write_text("a file")
    (tmp_path / "other" / "metrics.jsonl").mkdir(parents=True)
    for name in ("run", "other"):
        with refused("cannot write ", "metrics.jsonl: ", "--workdir"):
            writer(tmp_path / name)


def read_events(path):
    """Return the events of a file: length (8 bytes), its checksum (4), data, its checksum (4)."""
    from tensorboardX.proto import event_pb2

    data, events = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return events


def test_scalars_and_the_mark_of_a_resume(tmp_path):
    metrics = writer(tmp_path, tensorboard=True, resume_step=4)
    metrics.write({"step": 5, "loss": 0.5, "mfu_full": None, "note": "x"})
    metrics.write({"step": 5, "eval_loss": 0.25})
    metrics.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    version, start, config, train, evaluation = read_events(path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (5, start.session_log.START)
    (text,) = config.summary.value
    assert (text.tag, text.metadata.plugin_data.plugin_name) == ("config/text_summary", "text")
    assert text.tensor.string_val == [b'```\n{\n "a": 1\n}\n```']
    assert [(v.tag, v.simple_value) for v in train.summary.value] == [("train/loss", 0.5)]
    assert [(v.tag, v.simple_value) for v in evaluation.summary.value] == [("eval/loss", 0.25)]
    assert evaluation.step == 5


def test_a_full_disk_ends_tensorboard_only(tmp_path, monkeypatch, capsys):
    metrics = writer(tmp_path, tensorboard=True)

    def full(writer: object, event: object) -> None:
        if event.step == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.write_event", full)
    for step in range(1, 30):
        metrics.write({"step": step, "loss": 0.5})
    metrics.close()
    assert len(load_metrics(tmp_path)) == 29
    assert capsys.readouterr().err.count("tensorboard is no longer written: [Errno 28] No") == 1


def test_a_folder_that_cannot_be_made_costs_tensorboard_only(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file")
    metrics = writer(tmp_path, tensorboard=True)
    metrics.write({"step": 1, "loss": 0.5})
    metrics.close()
    assert "tensorboard is no longer written: [Errno 17] File exists" in capsys.readouterr().err
    assert [(row["step"], row["loss"]) for row in load_metrics(tmp_path)] == [(1, 0.5)]


def test_no_package_is_imported_that_is_not_needed(tmp_path):
    """Stand-ins of what tensorboardX would import end the process."""
    for name in ("torch", "boto3", "google/cloud/storage"):
        stand_in = tmp_path / "site" / f"{name}.py"
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.write_text(f"raise SystemExit('{name} was imported')")
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from llamajax.monitoring.sinks import close_sinks, open_sinks\n"
        "(sink,) = open_sinks(['tensorboard'], Path(sys.argv[1]), after_step=0, config={})\n"
        "close_sinks([sink])\n"
        "assert not {'torch', 'boto3', 'google.cloud.storage'} & set(sys.modules)\n"
    )
    path = os.pathsep.join([str(tmp_path / "site"), *sys.path])
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
