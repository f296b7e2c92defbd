"""The step of the two big configs, compiled in a process with as many virtual devices."""

import json
import sys
from pathlib import Path

import pytest
import warm

CONFIGS = Path(__file__).parents[2] / "configs"

PROGRAM = """
import json, math, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
import jax.numpy as jnp
from llamajax import optim, sharding
from llamajax.config import load
from llamajax.models.counts import num_parameters
from llamajax.models.llama import Compute
from llamajax.training.feed import abstract_batch
from llamajax.training.state import StateSpec
from llamajax.training.step import train_step

config = load(sys.argv[1])
mesh = sharding.build_mesh(config.mesh, jax.devices())
optimizer = optim.build(config.optim, steps=config.train.steps)
state = StateSpec(model=config.model, optimizer=optimizer, mesh=mesh).abstract()
compute = Compute(
    dtype=jnp.dtype(config.train.dtype), remat=config.train.remat, attention="blocked",
    loss_chunk_tokens=512, z_weight=0.0,
)
batch = abstract_batch(config.data, mesh, batch_size=config.data.global_batch_size)
lowered = train_step(optimizer, config.optim, config.train, compute, mesh).lower(state, batch)
found = {"parameters": num_parameters(config.model)}
found["replicated"] = [
    str(path) for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if leaf.ndim > 1 and math.prod(leaf.sharding.shard_shape(leaf.shape)) == math.prod(leaf.shape)
]
found["arguments"] = lowered.compile().memory_analysis().argument_size_in_bytes
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("config", "devices"), [("llama3_70b.py", 64), ("llama2_7b.py", 8)])
def test_the_big_steps_compile_with_every_matrix_in_shards(config, devices):
    command = [sys.executable, "-c", PROGRAM, str(CONFIGS / config), str(devices)]
    done = warm.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["replicated"] == []
    # fp32 weights and two moments; the batch adds a little.
    expected = 12 * found["parameters"] / devices
    assert found["arguments"] == pytest.approx(expected, rel=0.02)
