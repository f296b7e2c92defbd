"""A run that is traced and measured: its parts add up to its step, and its bits stay the same."""

import json
import math
import re

import pytest
from shell import TINY_RUN, shell
from workdirs import read_rows

from llamajax.monitoring.row_comparison import largest_difference, logged_values


def trained(data, workdir, keys):
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    return shell("train", f"--config={TINY_RUN}:{data}", f"--workdir={workdir}", *flags)


@pytest.mark.slow
def test_a_traced_run(short_data, tmp_path):
    """Eight devices on three axes. The trace is one that Perfetto and XProf open."""
    keys = {
        "train.steps": 4, "train.eval_every": 0, "model.num_layers": 2,
        "backend.num_cpu_devices": 8, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2,
    }  # fmt: skip
    looked = {
        "monitoring.profile_steps": "3:4", "monitoring.dump_hlo": "true",
        "monitoring.norms_every": 2, "backend.compile_cache": "none",
    }  # fmt: skip
    run, plain = tmp_path / "run", tmp_path / "plain"
    assert trained(short_data, plain, keys).returncode == 0
    done = trained(short_data, run, keys | looked)
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "profile" / "summary.json").read_text())
    assert (found["steps"], found["devices"], found["planned"]) == ([3, 4], 8, None)
    assert set(found["communication_s"]) >= {"fsdp", "tensor"}
    assert min(found[f"{part}_s"] for part in ("products", "attention", "other")) > 0
    assert "unknown_s" not in found
    parts = ("products", "attention", "other", "exposed_communication", "idle", "other_programs")
    total = sum(found.get(f"{part}_s", 0.0) for part in parts)
    assert total == pytest.approx(found["step_s"], rel=0.05)
    assert re.search(r"profile  steps 3 to 4: .*\n.*seconds a step.* measured", done.stderr)
    assert len(list((run / "profile").rglob("*.trace.json.gz"))) == 1
    assert "ENTRY" in (run / "profile" / "update.hlo.txt").read_text()
    assert largest_difference(logged_values(plain), logged_values(run)) is None
    rows = {row["step"]: row for row in read_rows(run / "metrics.jsonl") if "loss" in row}
    for step, norms in enumerate(read_rows(run / "norms.jsonl"), start=1):
        assert norms["step"] == 2 * step
        gradient = [value for name, value in norms.items() if name.startswith("norm_gradient/")]
        assert math.hypot(*gradient) == pytest.approx(rows[2 * step]["grad_norm"], rel=1e-5)
        # Adam's first updates are of the learning rate's size, and the last rate is 0.
        update, rate = norms["norm_update/head"], rows[2 * step]["learning_rate"]
        assert update == pytest.approx(rate * math.sqrt(384 * 48), rel=0.9) if rate else update == 0
    assert step == 2
    # Norms after each step would fill the record.
    assert not [e for e in read_rows(run / "events.jsonl") if e["event"] == "norms"]
