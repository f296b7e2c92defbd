"""Every file in configs/: it loads, follows an override of its length, and states its result."""

import ast
from pathlib import Path

import pytest

from llamajax.config import load

FOLDER = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.py"))


def test_the_promised_files_are_there():
    promised = {"quickstart", "llama2_7b", "llama3_70b", "llama3_8b", "llama3_2_1b", "my_text"}
    assert promised <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_loads_and_follows_its_length(path):
    run = load(str(path))
    assert load(str(path), {"train.steps": "20"}).optim.warmup_steps <= run.optim.warmup_steps


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_docstring_states_hardware_command_speed_and_loss(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    lines = {line.partition(":")[0]: line for line in docstring.splitlines()}
    for heading in ("Hardware", "Command", "Speed", "Loss"):
        assert heading in lines, f"{path.name} has no line '{heading}:'"
    assert f"--config=configs/{path.name}" in docstring
    for heading in ("Speed", "Loss"):
        words = ("measured", "planned", "unmeasured")
        assert any(word in lines[heading] for word in words), f"{heading} is not marked"


def test_the_cluster_configs_are_the_practices_they_name():
    small = load(str(FOLDER / "llama2_7b.py"))
    assert small.data.seq_len * small.data.global_batch_size == 262_144
    assert (small.mesh.fsdp, small.train.accumulation_steps) == (8, 4)
    large = load(str(FOLDER / "llama3_70b.py"))
    assert large.data.seq_len * large.data.global_batch_size == 2_097_152
    assert large.mesh.fsdp * large.mesh.tensor == 64
    piped = load(str(FOLDER / "llama3_70b.py") + ":pipeline")
    assert (piped.mesh.tensor, piped.mesh.stage, piped.train.microbatch_size) == (8, 8, 1)
