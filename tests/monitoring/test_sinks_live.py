"""TensorBoard's reader and W&B's offline files have the numbers of metrics.jsonl, also resumed."""

import json
import struct

import numpy as np
import pytest

from llamajax.monitoring import MetricsWriter, load_metrics
from llamajax.monitoring.sinks import open_sinks, tagged


def wandb_records(path):
    """Yield the records of a `.wandb` file, a log in LevelDB's format after 7 bytes."""
    data, at, record, block = path.read_bytes(), 7, b"", 32768
    while at + 7 <= len(data):
        if block - at % block < 7:  # no room for a header: padding
            at += block - at % block
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def in_wandb(workdir):
    """Return run ids, and numbers by tag and step."""
    from wandb.proto import wandb_internal_pb2

    ids, found = set(), {}
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            items = record.history.item
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
            found |= {(tag, row["step"]): value for tag, value in row.items() if "/" in tag}
    return ids, found


def in_tensorboard(workdir):
    """Return numbers by tag and step, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(f"{workdir / 'tensorboard'}", size_guidance={"scalars": 0}).Reload()
    assert reader.Tags()["tensors"] == ["config/text_summary"]
    tags = reader.Tags()["scalars"]
    return {(tag, event.step): event.value for tag in tags for event in reader.Scalars(tag)}


@pytest.mark.live
def test_all_hold_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = ["tensorboard", "wandb"]
    for resume_step, last in ((0, 40), (30, 60)):
        metrics = MetricsWriter(
            tmp_path,
            resume_step=resume_step,
            primary=True,
            open_sinks=lambda step: open_sinks(names, tmp_path, after_step=step, config={"a": 1}),
        )
        for step in range(resume_step + 1, last + 1):
            metrics.write(
                {"step": step, "loss": 1 / step, "tokens_per_s": 0.1, "time_s": 9.0 * step}
            )
            if step % 10 == 0:
                metrics.write({"step": step, "eval_loss": 2 / step, "time_s": 9.0 * step})
        metrics.close()
    numbers = {
        (tag, row["step"]): value
        for row in load_metrics(tmp_path)
        for tag, value in tagged(row).items()
    }
    assert len(numbers) == 60 * 3 + 6 * 2
    ids, found = in_wandb(tmp_path)
    assert (len(ids), found) == (1, numbers)
    assert in_tensorboard(tmp_path) == {key: float(np.float32(v)) for key, v in numbers.items()}
