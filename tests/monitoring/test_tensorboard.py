"""The TensorBoard sink writes real event files, and a full disk never stops the run."""

import os
import struct
import subprocess
import sys

from llamajax.monitoring import MetricsWriter, load_metrics


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
    metrics = MetricsWriter(tmp_path, tensorboard=True, resume_step=4, primary=True)
    metrics.write({"step": 5, "loss": 0.5, "mfu_full": None, "note": "x"})
    metrics.write({"step": 5, "eval_loss": 0.25})
    metrics.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    version, start, train, evaluation = read_events(path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (5, start.session_log.START)
    assert [(v.tag, v.simple_value) for v in train.summary.value] == [("loss", 0.5)]
    assert [(v.tag, v.simple_value) for v in evaluation.summary.value] == [("eval_loss", 0.25)]
    assert evaluation.step == 5


def test_a_full_disk_ends_tensorboard_only(tmp_path, monkeypatch, capsys):
    metrics = MetricsWriter(tmp_path, tensorboard=True, resume_step=0, primary=True)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.write_event", full)
    for step in range(1, 30):
        metrics.write({"step": step, "loss": 0.5})
    metrics.close()
    assert len(load_metrics(tmp_path)) == 29
    assert capsys.readouterr().err.count("tensorboard/ is no longer written") == 1


def test_a_folder_that_cannot_be_made_costs_tensorboard_only(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file")
    metrics = MetricsWriter(tmp_path, tensorboard=True, resume_step=0, primary=True)
    metrics.write({"step": 1, "loss": 0.5})
    metrics.close()
    assert "tensorboard cannot be written: File exists" in capsys.readouterr().err
    assert load_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_no_package_is_imported_that_is_not_needed(tmp_path):
    """Stand-ins of what tensorboardX would import end the process."""
    for name in ("torch", "boto3", "google/cloud/storage"):
        stand_in = tmp_path / "site" / f"{name}.py"
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.write_text(f"raise SystemExit('{name} was imported')")
    code = (
        "import sys\nfrom pathlib import Path\nfrom llamajax.monitoring import MetricsWriter\n"
        "MetricsWriter(Path(sys.argv[1]), tensorboard=True, resume_step=0, primary=True).close()\n"
        "assert not {'torch', 'boto3', 'google.cloud.storage'} & set(sys.modules)\n"
    )
    path = os.pathsep.join([str(tmp_path / "site"), *sys.path])
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
