"""Every file in configs/: it loads, follows an override of its length, and states its result."""

import ast
import json
from pathlib import Path

import pytest

from llamajax.config import load
from llamajax.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_loads_follows_its_length_and_states_hardware_command_speed_and_loss(path):
    run = load(str(path))
    assert load(path.stem) == run, "found by its name, inside the package"
    assert load(str(path), {"train.steps": "20"}).optim.warmup_steps <= run.optim.warmup_steps
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    lines = {line.partition(":")[0]: line for line in docstring.splitlines()}
    assert {"Hardware", "Command", "Speed", "Loss"} <= set(lines)
    assert f"--config=configs/{path.name}" in docstring
    for heading in ("Speed", "Loss"):
        words = ("measured", "planned", "unmeasured")
        assert any(word in lines[heading] for word in words), f"{heading} is not marked"


def test_the_configs_are_the_practices_they_name():
    promised = {"quickstart", "llama2_7b", "llama3_70b", "llama3_8b", "llama3_2_1b", "my_text"}
    assert promised <= {path.stem for path in FILES}
    small = load(str(FOLDER / "llama2_7b.py"))
    assert small.data.seq_len * small.data.global_batch_size == 262_144
    assert (small.mesh.fsdp, small.train.accumulation_steps) == (8, 4)
    large = load(str(FOLDER / "llama3_70b.py"))
    assert large.data.seq_len * large.data.global_batch_size == 2_097_152
    assert large.mesh.fsdp * large.mesh.tensor == 64
    piped = load(str(FOLDER / "llama3_70b.py") + ":pipeline")
    assert (piped.mesh.tensor, piped.mesh.stage, piped.train.microbatch_size) == (8, 8, 1)


@pytest.mark.parametrize(
    ("tokens", "preset", "steps"),
    [(10, "", 100), (354_513, "", 692), (10**9, "", 3000), (10**7, "bench-32m,", 610)],
)
def test_own_text_is_read_four_times_within_limits(tmp_path, tokens, preset, steps):
    facts = {"tokenizer": {"vocab_size": 5000}, "splits": {"train": {"tokens": tokens}}}
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    run = load(f"{FOLDER}/my_text.py:{preset}{tmp_path}")
    assert (run.train.steps, run.model.vocab_size, run.data.path) == (steps, 5000, str(tmp_path))
    assert run.model.name == (preset.strip(",") or "quickstart")


@pytest.mark.parametrize(
    ("argument", "message"),
    [("bench-23m,data/mine", "did you mean bench-32m"), ("data/a,data/b", "a preset, a directory")],
)
def test_own_text_refuses_what_is_neither_a_preset_nor_one_directory(argument, message):
    with pytest.raises(UserError, match=message):
        load(f"{FOLDER}/my_text.py:{argument}")
