"""A traced run whose parts add up to its step."""

import json
import re

import pytest
from shell import TINY_RUN, shell


@pytest.mark.slow
def test_a_traced_run(short_data, tmp_path):
    """Eight devices on three axes. The trace is one that Perfetto and XProf open."""
    keys = {
        "train.steps": 4, "train.eval_every": 0, "model.num_layers": 2,
        "backend.num_cpu_devices": 8,
        "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "monitoring.profile_steps": "3:4",
        "monitoring.dump_hlo": "true", "backend.compile_cache": "none",
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    run = tmp_path / "run"
    done = shell("train", f"--config={TINY_RUN}:{short_data}", f"--workdir={run}", *flags)
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
