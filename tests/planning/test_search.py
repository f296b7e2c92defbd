"""A search: every mesh that is allowed, none that is not, what fits first."""

import dataclasses
import math
from pathlib import Path

import pytest

from llamajax import sharding
from llamajax.config import load
from llamajax.errors import UserError
from llamajax.models.machine_choices import check_mesh, with_loss_chunk
from llamajax.models.memory import held_bytes
from llamajax.planning.search import candidates, meshes, search


def test_meshes_are_all_products_and_each_once():
    found = [tuple(sizes.items()) for sizes in meshes(8)]
    # 8 = 2**3: ways to deal 3 factors to 5 axes
    assert len(found) == len(set(found)) == math.comb(3 + 4, 4)
    assert all(math.prod(n for _, n in sizes) == 8 for sizes in found)
    assert all(tuple(axis for axis, _ in sizes) == sharding.AXES for sizes in found)


def test_candidates_are_runs_that_train_would_accept(config, known_devices):
    target = known_devices()
    found = candidates(config, target)
    for candidate in found:
        check_mesh(candidate.config, sharding.build_mesh(candidate.config.mesh, target.devices))
        assert candidate.held_bytes <= target.entry.limit_bytes
    speeds = [c.prediction.tokens_per_s for c in found]
    assert speeds == sorted(speeds, reverse=True)
    assert {c.config.train.remat for c in found} >= {"none", "full", "dots"}
    used = {axis for c in found for axis, size in c.mesh.shape.items() if size > 1}
    assert used == set(sharding.AXES)
    # 2 kv heads cannot be split in 4, nor 16 samples in 32 microbatches
    assert max(c.mesh.shape["tensor"] for c in found) == 2
    assert max(c.config.train.accumulation_steps for c in found) == 16


def test_memory_decides_what_is_tried(config, known_devices):
    every = candidates(config, known_devices())
    middle = sorted(c.held_bytes for c in every)[len(every) // 2]
    fewer = candidates(config, known_devices(int(middle) + 1))
    assert 0 < len(fewer) < len(every)
    assert max(c.held_bytes for c in fewer) <= 1.05 * (middle + 1)
    with pytest.raises(UserError, match="use more or larger devices"):
        candidates(config, known_devices(1000))


def test_on_gpus_nothing_is_gathered_beside_what_tensor_exchanges(config, known_devices):
    """XLA runs one collective at a time there: 70B on fsdp 16 x tensor 4 hides a tenth."""

    def speeds(platform):
        target = known_devices()
        machine = dataclasses.replace(target.machine, platform=platform)
        target = dataclasses.replace(target, machine=machine)
        return {
            (*c.mesh.shape.values(), c.config.train.remat, c.config.train.accumulation_steps): c
            for c in candidates(config, target)
        }

    others = speeds("cpu")
    for key, found in speeds("gpu").items():
        slower = found.mesh.shape["tensor"] > 1 and found.mesh.shape["fsdp"] > 1
        assert (found.prediction.tokens_per_s < others[key].prediction.tokens_per_s) == slower


def test_a_search_returns_compiled_plans(config, known_devices, tmp_path):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1))
    (found,) = search(config, known_devices(), cache=tmp_path, wanted=1)
    assert found.config == candidates(config, known_devices())[0].config
    assert found.facts.arguments_bytes > 0
    assert found.prediction.tokens_per_s > 0


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("llama2_7b.py", "h100"),
        ("llama2_7b.py", "a100"),
        ("llama3_70b.py", "h100"),
        ("llama3_70b.py", "a100"),
        ("llama3_70b.py", "v5p"),
        ("llama3_70b.py:pipeline", "h100"),
        ("llama3_70b.py:b200", "b200"),
        ("llama3_70b.py:h200", "h200"),
        ("llama3_70b.py:v5p", "v5p"),
        ("llama3_70b.py:v6e", "v6e"),
        ("llama3_70b.py:slices", "v5p"),
    ],
)
def test_what_configs_recommend_would_be_tried_on_that_hardware(table, file, kind):
    config = load(str(Path(__file__).parents[2] / "configs" / file), {})
    sizes = {axis: getattr(config.mesh, axis) for axis in sharding.AXES}
    config = with_loss_chunk(config, "gpu" if table[kind].has_share else "tpu", sizes)
    held, limit = held_bytes(config, sizes), table[kind].limit_bytes
    assert 0.3 * limit < held <= limit, "a layout for this hardware uses it"
