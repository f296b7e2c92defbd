"""What a run says of its data and of memory before it starts, and what a dry run prints."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import pytest
from refusal import refused
from workdirs import prepare_texts, run_prepare, write_rows

from llamajax import backends
from llamajax.config.keys import all_keys, own_keys
from llamajax.config.model_schema import RopeScaling
from llamajax.config.schema import MeshConfig
from llamajax.data import Position
from llamajax.data.packing import EXAMPLES, WINDOWS
from llamajax.models.lora import num_adapter_parameters
from llamajax.models.memory import held_parts, host_bytes, state_bytes
from llamajax.processes import host_collectives
from llamajax.sharding import build_mesh
from llamajax.training.messages import dry_run, memory_warnings
from llamajax.training.setup import set_up
from llamajax.training.stage_data import stage_data


def test_odd_data_is_a_warning(short_config, short_data, tmp_path):
    whole = prepare_texts(tmp_path, ["without a validation split"] * 9, held_out=0)
    keys = {"data.path": f"{short_data},{whole}", "model.vocab_size": 128_256}
    keys |= {"train.steps": 10_000, "data.stages": [{"from_step": 9000, "path": f"{whole}"}]}
    config = short_config(**keys)
    lines = dry_run(config, workdir=tmp_path / "run", overrides={})
    found = [line for line in lines if line.startswith("warning: ")][:4]
    expected = [
        r"train.steps reads the \S+ tokens of data.path \S+ times",
        rf"data.stages\[0\] reads the \d+ tokens of its path, {whole}, \S+ times",
        "model.vocab_size = 128,256, but the tokenizer .* only 258",
        f"evaluation leaves out {whole}: prepared without a validation split",
    ]
    assert all(re.search(*pair) for pair in zip(expected, found, strict=True)), found


def test_a_host_without_the_memory_is_a_warning(short_config, monkeypatch):
    mesh = build_mesh(MeshConfig(fsdp=8), jax.devices())
    run = SimpleNamespace(config=short_config(), mesh=mesh, machine=SimpleNamespace(platform="cpu"))
    run.stages = ((0, run),)
    needed = host_bytes(run.config, mesh.shape, num_devices=8, is_host=True)
    for there in (None, int(needed) + 1):
        monkeypatch.setattr(backends, "host_memory_bytes", lambda there=there: there)
        assert list(memory_warnings(run)) == []
    monkeypatch.setattr(backends, "host_memory_bytes", lambda: int(needed) - 1)
    (line,) = memory_warnings(run)
    assert re.search(r"needs about \d+ MiB of this host's memory, .* there are \d+ MiB", line)


def test_the_host_of_an_accelerator_holds_a_save_and_what_is_offloaded(short_config):
    sizes = {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1, "stage": 1}
    facts = {"num_devices": 8, "is_host": False}
    kept, moved = (short_config(**{"optim.offload": offload}) for offload in (False, True))
    state, fixed = state_bytes(kept, sizes), 0.45 * 2**30
    assert host_bytes(kept, sizes, **facts) - fixed == pytest.approx(4 * state)
    assert host_bytes(moved, sizes, **facts) - fixed == pytest.approx((4 + 8 * 2 / 3) * state)
    # adapters in 4 bytes, their moments in 2 each; the frozen base is neither saved nor offloaded
    adapters = {"lora.rank": 2, "train.init_from": "base", "optim.moment_dtype": "bfloat16"}
    for offload in (False, True):
        lora = short_config(**adapters, **{"optim.offload": offload})
        saved = 8 * num_adapter_parameters(lora.model, lora.lora)
        held = 8 * 4 / 8 * (state_bytes(lora, sizes) - state / 3) if offload else 0
        assert host_bytes(lora, sizes, **facts) - fixed == pytest.approx(saved + held)


def test_a_control_group_bounds_the_hosts_memory(tmp_path, monkeypatch):
    limits = [tmp_path / name for name in ("none", "max", "some")]
    limits[1].write_text("max\n")
    limits[2].write_text("1000\n")
    monkeypatch.setattr("llamajax.backends.machine_facts._MEMORY_LIMITS", limits[:2])
    assert backends.host_memory_bytes() > 2**20
    monkeypatch.setattr("llamajax.backends.machine_facts._MEMORY_LIMITS", limits)
    assert backends.host_memory_bytes() == 1000


@pytest.mark.parametrize(("remat", "warned"), [("none", 0), ("save_attention", 1)])
def test_own_attention_that_remat_cannot_keep_is_a_warning(short_config, remat, warned):
    keys = {"train.attention": "own_attention:unnamed", "train.remat": remat}
    attention = set_up(short_config(**keys), keep_programs=False).attention
    assert "float32 error" in attention.reason
    assert len(attention.warnings()) == warned


@pytest.mark.parametrize("key", ["train.attention", "optim.chain"])
@pytest.mark.parametrize("code", ["no_such_module:f", "sys:exit"])
def test_what_fails_in_own_code_is_said_to_all_processes(short_config, monkeypatch, key, code):
    said = []
    monkeypatch.setattr(host_collectives, "first_problem", lambda it: said.append(it) or it)
    with refused(f"{key} = {code}"):
        set_up(short_config(**{key: code}), keep_programs=False)
    assert said[-1].startswith(f"2 {key} = {code}")


def test_a_dry_run_prints_every_value_with_its_origin_and_writes_nothing(
    short_config, short_data, tmp_path
):
    config = short_config()
    overrides = {"train.steps": "60", "model.num_layers": "1"}
    lines = list(dry_run(config, workdir=tmp_path / "run", overrides=overrides))
    values = dict(line.split("  # ") for line in lines[: lines.index("")])
    origins = {text.rstrip(): origin for text, origin in values.items()}
    assert origins["train.steps = 60"] == origins["model.num_layers = 1"] == "command line"
    assert origins["model.hidden_size = 48"] == "preset tiny"
    assert origins["model.vocab_size = 258"] == "config file"
    assert origins["model.rope_scaling = none"] == origins["mesh.data = 1"] == "default"
    assert len(origins) == len(all_keys()) - len(own_keys(RopeScaling))  # it is none
    told = {line.partition(" ")[0]: line for line in lines[lines.index("") + 1 :]}
    assert told["kernels"] == "kernels  attention blocked: the first choice on cpu"
    assert re.search(rf"^epochs   \d\.\d+ of {short_data} \(.* tokens in 60 steps", told["epochs"])
    total = sum(held_parts(config, build_mesh(config.mesh, jax.devices()).shape).values())
    assert f"memory   {total / 2**20:.3g} MiB a device at least" in told["memory"]
    assert {"model", "machine", "data", "steps"} <= told.keys()
    assert not [line for line in lines if line.startswith("warning")]
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_half_empty_are_a_warning(short_config, tmp_path):
    """Also where the instructions come after a stage of text; it names what fills rows."""
    rows = [{"prompt": "q" * 20, "completion": "a" * 10}] * 300
    chats = write_rows(tmp_path / "chats.jsonl", *rows)
    run_prepare(chats, tmp_path / "chats", "--format=instructions")
    stages = [{"from_step": 1, "path": str(tmp_path / "chats")}]
    config = short_config(**{"data.stages": stages, "train.steps": 3})
    setup = set_up(config, keep_programs=False)
    place = Position.start(batch_size=8, seq_len=48, mixture_hash="m", packing=WINDOWS)
    first = place.segments[0]
    begun, later = (
        place.extended(dataclasses.replace(first, first_step=step, packing=EXAMPLES))
        for step in (1, 2)
    )
    text, chats = stage_data(setup, begun, 0)
    assert (text.packing_facts, text.packing_problem) == ({}, None)
    assert chats.packing_facts["efficiency"] == pytest.approx(31 / 48)
    problem = chats.packing_problem
    assert problem.startswith("only 64.6% of the positions hold tokens")
    assert "data.seq_len = 1024 (" in problem
    lines = list(dry_run(config, workdir=tmp_path / "run", overrides={}))
    assert f"warning: {problem}" in lines
    assert stage_data(setup, place, 0)[1].packing_problem is None
    # What is over is described as it was, whatever is chosen now.
    ended = SimpleNamespace(borders=[1, 2], config=config, stages=((0, 0), (1, 0), (2, 0)))
    found = [each.packing for each in stage_data(ended, later, 2)]
    assert found == [WINDOWS, WINDOWS, EXAMPLES]
