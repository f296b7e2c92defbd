"""Two processes on one CPU train adapters on imported weights and export what comes of them."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import warm

CONFIG = Path(__file__).with_name("tiny_run.py")
# `train` in a process that may not write a byte of an export.
_FORBIDDEN = """
import sys
from llamajax import train
from llamajax.formats.huggingface import hf_write
from llamajax.formats import peft
def refuse(*_args, **_options):
    raise RuntimeError("this process writes an export")
for module in (hf_write, peft):
    module.replaced_directory = module.write_json = module.write_safetensors = refuse
sys.exit(train.main(sys.argv[1:]))
"""


def started(rank: int, port: int, *flags: str) -> subprocess.Popen:
    """One of two processes with two devices each; the second may not write an export."""
    program = ["-c", _FORBIDDEN] if rank else ["-m", "llamajax.train"]
    place = {"num_cpu_devices": 2, "num_processes": 2, "process_id": rank}
    place["coordinator_address"] = f"127.0.0.1:{port}"
    flags += tuple(f"--config.backend.{key}={value}" for key, value in place.items())
    return warm.Popen(
        [sys.executable, *program, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_both_end_and_the_first_writes_the_exports(
    short_run, short_data, loaded, tmp_path, monkeypatch
):
    base, workdir = tmp_path / "base", tmp_path / "run"
    assert short_run(base, train__steps=3) == 0
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    keys = {
        "model.num_layers": 1,
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "train.steps": 4,
        "train.eval_every": 0,
        "train.init_from": base,
        "lora.rank": 3,
        "lora.alpha": 6,
        "optim.learning_rate": 0.02,
        "checkpoint.every_steps": 2,
        "checkpoint.export_hf_every": 2,
        "monitoring.progress": "none",
    }
    flags = [f"--config={CONFIG}:{short_data}", f"--workdir={workdir}"]
    flags += [f"--config.{key}={value}" for key, value in keys.items()]
    both = [started(rank, port, *flags) for rank in (1, 0)]
    texts = [process.communicate(timeout=500)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(texts)
    (warned,) = [line for line in "".join(texts).splitlines() if "warning" in line]
    assert "its base, which PEFT cannot load" in warned
    assert sorted(path.name for path in (workdir / "hf").iterdir()) == ["2", "4"]
    assert sorted(path.name for path in (workdir / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    merged, before = loaded(workdir), loaded(base)
    for name, value in loaded(workdir / "hf" / "4").items():
        np.testing.assert_allclose(value, merged[name], rtol=0, atol=1e-6, err_msg=name)
    assert any(np.abs(value - before[name]).max() > 1e-3 for name, value in merged.items())
