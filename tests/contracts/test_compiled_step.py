"""The step of the two big configs, compiled for devices that are not here; its collectives, read.

Each compilation has a process of its own, for its number of virtual devices.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parents[2]

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

config = load(sys.argv[1], json.loads(sys.argv[3]))
mesh = sharding.build_mesh(config.mesh, jax.devices())
optimizer = optim.build(config.optim, steps=config.train.steps)
state = StateSpec(model=config.model, optimizer=optimizer, mesh=mesh).abstract()
compute = Compute(
    dtype=jnp.dtype(config.train.dtype), remat=config.train.remat, attention="blocked",
    loss_chunk_tokens=512, z_weight=0.0,
)
batch = abstract_batch(config.data, mesh, batch_size=config.data.global_batch_size)
lowered = train_step(optimizer, config.optim, config.train, compute, mesh).lower(state, batch)
found = {"parameters": num_parameters(config.model), "text": "", "arguments": 0}
found["replicated"] = [
    str(path) for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if leaf.ndim > 1 and math.prod(leaf.sharding.shard_shape(leaf.shape)) == math.prod(leaf.shape)
]
if sys.argv[4] == "compile":
    found["arguments"] = lowered.compile().memory_analysis().argument_size_in_bytes
else:
    found["text"] = lowered.as_text()
print(json.dumps(found))
"""


def built(config, num_devices, overrides, *, compiled):
    arguments = [f"{ROOT / 'configs' / config}", str(num_devices), json.dumps(overrides)]
    command = [sys.executable, "-c", PROGRAM, *arguments, "compile" if compiled else "lower"]
    done = warm.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("config", "devices"), [("llama3_70b.py", 64), ("llama2_7b.py", 8)])
def test_the_big_steps_compile_with_every_matrix_in_shards(config, devices):
    found = built(config, devices, {}, compiled=True)
    assert found["replicated"] == []
    # fp32 weights and two moments; the batch adds a little.
    expected = 12 * found["parameters"] / devices
    assert found["arguments"] == pytest.approx(expected, rel=0.02)


def collectives(text):
    """(kind, dtype, elements) of the largest operand or result of every collective."""
    found = []
    for match in re.finditer(r'"?stablehlo\.(all_gather|all_reduce|reduce_scatter)"?', text):
        # The type of an operation with a region stands after the region: the next `-> tensor`.
        result = re.search(r"\) -> \(?tensor<([0-9x]*?)x?(bf16|f32|i32|i1)>", text[match.end() :])
        size = 1
        for part in result[1].split("x"):
            size *= int(part) if part else 1
        found.append((match[1], result[2], size))
    return found


@pytest.fixture(scope="module")
def bf16_step():
    small = {
        "mesh.fsdp": 2, "mesh.tensor": 2, "data.global_batch_size": 4, "data.seq_len": 256,
        "model.hidden_size": 512, "model.num_layers": 2, "train.accumulation_steps": 1,
    }  # fmt: skip
    return built("llama3_70b.py", 4, small, compiled=False)["text"]


def test_weights_travel_in_bfloat16_and_gradients_in_float32(bf16_step):
    found = collectives(bf16_step)
    gathered = {dtype for kind, dtype, size in found if kind == "all_gather" and size > 4096}
    scattered = {dtype for kind, dtype, _ in found if kind == "reduce_scatter"}
    assert gathered == {"bf16"}
    assert scattered == {"f32"}


def test_gradients_of_weights_leave_their_product_in_float32(bf16_step):
    products = re.findall(r"stablehlo\.dot_general.* -> tensor<(\w+)x(\w+)>", bf16_step)
    # of down and out alone have these shapes; those of gate and up have that of an activation
    assert {d for shape, d in products if shape in ("14336x512", "4096x512")} == {"f32"}
    assert products.count(("512x14336", "f32")) == 2


def test_nothing_as_large_as_logits_or_a_batch_of_activations_is_reduced(bf16_step):
    activation = 2 * 256 * 512  # local batch x T x D
    found = collectives(bf16_step)
    assert found
    assert max(size for kind, _, size in found if kind == "all_reduce") <= activation
    weights = 28672 // 2 * 512  # the largest weight in use, and the head below
    head = 128256 // 2 * 512
    assert max(size for kind, _, size in found if kind == "all_gather") <= max(weights, head)
    assert f"x{128256 // 2}xf32" in bf16_step  # logits exist, for a chunk of tokens
    assert "512x64128xf32" in bf16_step.replace("tensor<", "")
