"""What the compiled step moves along each mesh axis, and what it never holds; read from XLA's text.

Sizes that are nobody else's, so that a shape in the text says what it is: T 64, D 48, F 80, V 1280.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from plain_batch import plain_batch
from tiny_model import tiny_model, tiny_optim

from llamajax import optim, sharding
from llamajax.config.schema import TrainConfig
from llamajax.models.counts import num_parameters
from llamajax.models.llama import Compute
from llamajax.models.pipeline import PipelineOptions, num_ticks
from llamajax.planning.hlo import Program
from llamajax.planning.traffic import axes_of_groups, groups_of
from llamajax.training.state import StateSpec
from llamajax.training.step import train_step

HEADS = {"num_heads": 8, "num_kv_heads": 4, "head_size": 6}
MODEL = tiny_model(vocab_size=1280, hidden_size=48, intermediate_size=80, num_layers=4, **HEADS)
OPTIM = tiny_optim()
B, T, D, V = 8, 64, MODEL.hidden_size, MODEL.vocab_size
FLOAT = 4


@functools.cache
def lowered(*axes, rounds=1, split=True, dtype="float32"):
    """The mesh of such pairs, and a step on it."""
    mesh = mesh_of(**dict(axes))
    compute = Compute(
        dtype=jnp.dtype(dtype), remat="full", loss_chunk_tokens=16,
        pipeline=PipelineOptions(rounds=rounds),
        attention="split" if mesh.shape["sequence"] > 1 else "blocked",
        split_tokens=split and mesh.shape["tensor"] > 1,
    )  # fmt: skip
    optimizer = optim.build(OPTIM, steps=10)
    state = StateSpec(model=MODEL, optimizer=optimizer, mesh=mesh, rounds=rounds).abstract()
    placed = sharding.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placed)
        for name, array in plain_batch(np.zeros((B, T + 1))).items()
    }
    train = TrainConfig(steps=10, seed=0, dtype=dtype)
    return mesh, train_step(optimizer, OPTIM, train, compute, mesh).lower(state, batch)


@functools.cache
def compiled(*axes, **options):
    """(text, moved) of a compiled step; moved: (axes, kind, dtype, bytes, count)."""
    mesh, step = lowered(*axes, **options)
    text = step.compile({"xla_backend_optimization_level": 0}).as_text()
    moved = []
    for found in Program(text).collectives():
        along = axes_of_groups(groups_of(found, mesh), mesh.shape)
        if along:
            moved.append((along, found.kind, found.dtype, found.operand_bytes, found.count))
    return text, moved


def along(moved, axis, kind=None):
    return [m for m in moved if axis in m[0] and kind in (None, m[1])]


def test_a_pipeline_passes_only_boundary_activations():
    _, moved = compiled(("stage", 2), ("fsdp", 2))
    permuted = along(moved, "stage", "collective-permute")
    microbatches = B // 2
    boundary = T * D * FLOAT
    assert {m[3] for m in permuted} == {boundary}
    ticks = num_ticks(stages=2, microbatches=microbatches, rounds=1)
    # to the next stage, from the embedding and to the loss; and the gradients of all three
    assert sum(m[4] for m in permuted) == 6 * ticks
    others = [m for m in along(moved, "stage") if m[1] != "collective-permute"]
    table = V * D // 2 * FLOAT
    assert {m[1] for m in others} == {"all-reduce"}, "sums of tables and scalars, once a step"
    assert all(m[4] == 1 for m in others)
    assert max(m[3] for m in others) <= 2 * table + 3 * D * FLOAT


def test_a_pipeline_gathers_weights_once_and_scatters_gradients_once():
    _, moved = compiled(("stage", 2), ("fsdp", 2))
    weights = 2 * 7  # two layers a stage in one stack: each of the seven matrices once
    gathered = [m for m in along(moved, "fsdp", "all-gather") if m[3] > 2 * D * FLOAT]
    scattered = [m for m in along(moved, "fsdp", "reduce-scatter") if m[3] > 4 * D * FLOAT]
    assert sum(m[4] for m in gathered if m[3] != V * D // 2 * FLOAT) <= weights
    matrices = 2 * (2 * D * 8 * 6 + 2 * D * 4 * 6 + 3 * D * 80)
    sent = sum(m[3] * m[4] for m in scattered) / FLOAT
    assert sent == pytest.approx(matrices + V * D, rel=0.02)


def test_rounds_cost_more_transfers_and_no_more_weights():
    _, one = compiled(("stage", 2))
    _, two = compiled(("stage", 2), rounds=2)
    for rounds, moved in ((1, one), (2, two)):
        count = sum(m[4] for m in along(moved, "stage", "collective-permute"))
        assert count == 6 * num_ticks(stages=2, microbatches=B, rounds=rounds)


def test_tensor_moves_parts_of_the_residual_and_sums_no_activation():
    text, moved = compiled(("tensor", 2), ("fsdp", 2))
    part = B // 2 * T // 2 * D * FLOAT
    activations = [m for m in along(moved, "tensor") if m[3] >= part]
    assert {m[1] for m in activations} == {"all-gather", "reduce-scatter"}
    assert {m[3] for m in activations} <= {part, 2 * part}
    chunk = 16 * FLOAT  # of each token of a chunk the maximum, the sum, the logit of the target
    norms = (2 * 4 + 1) * D * FLOAT
    assert max(m[3] for m in along(moved, "tensor", "all-reduce")) <= max(chunk, norms)
    assert f"16,{V // 2}]" in text, "logits of a chunk exist"
    assert not re.search(rf"\[(\d+,)*{V}\]", text), "and never those of the whole vocabulary"


def test_a_sequence_moves_keys_and_values_and_holds_no_square():
    text, moved = compiled(("sequence", 4))
    keys = B * T // 4 * 4 * 6 * FLOAT
    gathered = along(moved, "sequence", "all-gather")
    assert {m[3] for m in gathered if m[2] != "s32"} == {keys}
    scattered = along(moved, "sequence", "reduce-scatter")
    assert {m[3] for m in scattered} == {4 * keys}, "gradients of keys and values, in float32"
    both = 2 * MODEL.num_layers
    assert sum(m[4] for m in gathered if m[2] != "s32") == 2 * both, "forward and backward"
    assert sum(m[4] for m in scattered) == both
    piece = T // 8
    assert re.search(rf"\[\d+,\d+,{piece},{piece}\]|\[\d+,\d+,{piece}\]", text)
    assert not re.search(rf"{T},{T}\]|{T // 4},{T}\]", text), "no scores of all tokens"


def test_data_is_summed_once():
    _, moved = compiled(("data", 2), ("fsdp", 2))
    assert {m[1] for m in along(moved, "data")} == {"all-reduce"}
    assert all(m[4] == 1 for m in along(moved, "data"))
    held = num_parameters(MODEL) / 2 * FLOAT  # half of each weight, by fsdp
    assert sum(m[3] for m in along(moved, "data")) == pytest.approx(held, rel=1e-3)


def test_a_tensor_axis_that_sums_activations_is_seen():
    """The reading can fail: with whole tokens between the blocks an activation is summed."""
    _, moved = compiled(("tensor", 2), split=False)
    largest = max(m[3] for m in along(moved, "tensor", "all-reduce"))
    assert largest >= B * T * D * FLOAT


def test_in_bfloat16_weights_travel_as_such_and_gradients_are_float32():
    """Read before compilation: for a CPU, the compiler makes all of it float32."""
    text = lowered(("fsdp", 2), ("tensor", 2), split=False, dtype="bfloat16")[1].as_text()
    operation = (
        r"stablehlo\.(all_gather|reduce_scatter).*?\) -> \(?tensor<([0-9x]*)x(bf16|f32|i32)>"
    )
    found = re.findall(operation, text, re.DOTALL)
    moved = {(kind, dtype) for kind, shape, dtype in found if shape not in (f"{D}", f"{B}x{T}")}
    assert moved == {("all_gather", "bf16"), ("reduce_scatter", "f32")}, "norms and ids left out"
    products = re.findall(r"stablehlo\.dot_general.* -> tensor<(\w+)x(\w+)>", text)
    query, key, hidden = 8 * 6 // 2, 4 * 6 // 2, MODEL.intermediate_size // 2
    gradients = [(D, query), (D, key), (query, D), (D, hidden), (hidden, D), (V // 2, D)]
    for rows, columns in gradients:
        dtypes = {dtype for shape, dtype in products if shape == f"{rows}x{columns}"}
        assert dtypes == {"f32"}, (rows, columns)
    assert (f"{B // 2 * T}x{D}", "bf16") in products, "of activations"
