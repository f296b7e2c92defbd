"""The formulas that a search ranks by, against compiled programs: bytes sent, state, products."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from llamajax import sharding
from llamajax.backends import absent_devices
from llamajax.config import MeshConfig, load
from llamajax.config.schema import Remat
from llamajax.models.counts import matrices_per_layer
from llamajax.models.llama import Compute
from llamajax.models.lora import attach, trainable
from llamajax.models.machine_choices import with_loss_chunk
from llamajax.models.memory import held_bytes, held_parts, state_bytes
from llamajax.planning import compilation, estimate, roofline
from llamajax.planning.hlo import Program
from llamajax.planning.hlo_products import product_flops
from llamajax.planning.planner import shard_bytes
from llamajax.planning.traffic import traffic
from llamajax.training.state import StateSpec

# (axes, remat, accumulation steps, rounds, microbatch size)
CASES = {
    "sequence": ({"fsdp": 4, "sequence": 2}, "full", 1, 1, 1),
    "sequence-tensor": ({"data": 2, "sequence": 2, "tensor": 2}, "none", 1, 1, 1),
    "stage": ({"stage": 2, "fsdp": 4}, "dots", 1, 1, 1),
    "stage-uneven": ({"stage": 4, "data": 2}, "full", 1, 1, 1),
    "stage-rounds": ({"stage": 2, "data": 4}, "full", 1, 2, 1),
    "stage-tensor": ({"stage": 2, "fsdp": 2, "tensor": 2}, "full", 1, 1, 2),
    "stage-sequence": ({"stage": 2, "fsdp": 2, "sequence": 2}, "full", 1, 1, 1),
    "tensor-dots": ({"fsdp": 4, "tensor": 2}, "dots", 1, 1, 1),
    "fsdp-none": ({"fsdp": 8}, "none", 2, 1, 1),
    "muon": ({"data": 2, "fsdp": 2, "tensor": 2}, "full", 1, 1, 1),
    "muon-stage": ({"stage": 2, "fsdp": 2, "sequence": 2}, "full", 1, 1, 1),
}
OPTIMIZERS = {
    "muon": {"name": "muon", "ema_decay": 0.99},
    "muon-stage": {"name": "muon", "moment_dtype": "bfloat16"},
}
# Every axis is in one of these; the others are in the whole suite.
FIRST = ("sequence-tensor", "stage-tensor", "stage-rounds", "fsdp-none", "muon")
each_case = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FIRST else [pytest.mark.slow]) for name in CASES],
)


@functools.cache
def compiled(name):
    """(config, axis sizes, step, text, bytes of arguments) of a case on virtual CPU devices."""
    axes, remat, accumulation, rounds, microbatch_size = CASES[name]
    layers = 6 if name == "stage-uneven" else 9 if name == "muon" else 4
    attention = "auto" if "sequence" in axes else "xla"
    small = load(str(Path(__file__).with_name("small_run.py")))
    config = dataclasses.replace(
        small,
        model=dataclasses.replace(small.model, num_layers=layers),
        mesh=MeshConfig(**axes),
        optim=dataclasses.replace(small.optim, **OPTIMIZERS.get(name, {})),
        train=dataclasses.replace(
            small.train, remat=remat, accumulation_steps=accumulation, attention=attention,
            pipeline_rounds=rounds, microbatch_size=microbatch_size,
        ),
    )  # fmt: skip
    step = compilation.abstract_step(config, absent_devices("cpu:8", config.backend))
    found = compilation.lowered_step(step).compile({"xla_backend_optimization_level": 0})
    arguments = found.memory_analysis().argument_size_in_bytes
    return config, dict(step.mesh.shape), step, found.as_text(), arguments


@pytest.mark.parametrize(
    ("platform", "vocabulary", "tensor", "tokens"),
    [
        ("cpu", 32_000, 1, 512),
        ("tpu", 32_000, 8, 512),
        ("gpu", 32_000, 1, 4096),
        ("cuda", 128_256, 1, 1024),
        ("rocm", 128_256, 8, 4096),
    ],
)
def test_tokens_of_a_chunk_of_logits_are_the_platforms_where_none_are_given(
    platform, vocabulary, tensor, tokens
):
    small = load(str(Path(__file__).with_name("small_run.py")))
    model = dataclasses.replace(small.model, vocab_size=vocabulary)
    given = dataclasses.replace(small, model=model)
    assert with_loss_chunk(given, platform, {"tensor": tensor}) is given
    train = dataclasses.replace(small.train, loss_chunk_tokens=None)
    chosen = with_loss_chunk(dataclasses.replace(given, train=train), platform, {"tensor": tensor})
    assert chosen.train.loss_chunk_tokens == tokens


@each_case
def test_bytes_sent_along_every_axis_are_those_of_the_program(name):
    config, sizes, step, text, _ = compiled(name)
    real: dict[tuple[str, ...], float] = {}
    for row in traffic(Program(text), step.mesh, [0] * 8):
        real[row.axes] = real.get(row.axes, 0.0) + row.sent_bytes
    # left out: norms, token ids, the sums of scalars
    told = {axes: sent for axes, sent in real.items() if sent > 0.002 * sum(real.values())}
    found = estimate.sent_bytes(config, sizes)
    assert set(found) == set(told)
    for axes, sent in found.items():
        assert sent == pytest.approx(told[axes], rel=0.03), axes


@each_case
def test_state_is_what_the_program_takes(name):
    config, sizes, _, _, arguments = compiled(name)
    parts = sizes["data"] * sizes["fsdp"]
    batch = config.data.global_batch_size * config.data.seq_len / parts * (4 * 4 + 1)
    assert state_bytes(config, sizes) == pytest.approx(arguments - batch, rel=0.03)
    assert held_bytes(config, sizes) > state_bytes(config, sizes)


@each_case
def test_products_are_those_of_the_program(name):
    """With the blocks that idle ticks of a pipeline run on nothing."""
    config, sizes, step, text, _ = compiled(name)
    found = roofline.expected_product_flops(config, sizes, attention=step.attention.impl)
    assert product_flops(Program(text)) * math.prod(sizes.values()) == pytest.approx(
        found, rel=0.03
    )


@pytest.mark.parametrize("remat", get_args(Remat))
@pytest.mark.parametrize(("tensor", "rank"), [(1, 0), (2, 0), (1, 5)])
def test_activations_are_what_the_backward_pass_is_given(config, remat, tensor, rank):
    """Of two more layers, by the residuals of the traced forward pass; with adapters as without."""
    rows, seq_len = 3, 128
    config = dataclasses.replace(
        config,
        lora=dataclasses.replace(config.lora, rank=rank, alpha=10.0),
        data=dataclasses.replace(config.data, seq_len=seq_len, global_batch_size=rows),
        train=dataclasses.replace(
            config.train, dtype="bfloat16", remat=remat, accumulation_steps=1
        ),
    )
    mesh = sharding.build_mesh(MeshConfig(tensor=tensor), jax.devices()[:tensor])
    compute = Compute(
        dtype=jnp.bfloat16, remat=remat, attention="blocked", loss_chunk_tokens=64, z_weight=0.0,
        split_tokens=tensor > 1,
    )  # fmt: skip
    tokens = (rows, rows * seq_len, rows * seq_len // tensor)  # second dims of activations

    def residuals(model, adapters):
        batch = dict.fromkeys(
            ("tokens", "positions", "segment_ids"), jnp.zeros((rows, seq_len), jnp.int32)
        )
        weights, whole = trainable(attach(model, adapters))
        backward = jax.vjp(lambda weights: whole(weights).hidden_states(batch, compute), weights)[1]
        for x in jax.tree.leaves(backward):  # scalars of a token are left out
            if x.ndim > 2 and x.shape[1] in tokens and x.shape[-1] not in (1, rank, seq_len):
                kept[-1] += x.size * x.dtype.itemsize
        return jnp.zeros(())

    kept, told = [], []
    for layers in (3, 5):
        model = dataclasses.replace(
            config.model, num_layers=layers, hidden_size=64, num_heads=8, num_kv_heads=2,
            intermediate_size=176,
        )  # fmt: skip
        deep = dataclasses.replace(config, model=model)
        told.append(held_parts(deep, dict(mesh.shape))["activations"])
        state = StateSpec.of(deep, mesh).abstract()
        given = (state.model, state.adapters)
        kept.append(0)
        specs = tuple(sharding.specs(weights, mesh) for weights in given)
        traced = jax.shard_map(
            residuals, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
        )
        jax.eval_shape(traced, *given)
    assert told[1] - told[0] == pytest.approx(kept[1] - kept[0], rel=0.01)


@pytest.mark.slow
def test_weights_in_8_bits_are_gathered_in_one_byte_and_the_others_in_two(config):
    """A CPU's program gathers 8 bits as 16, and 16 as 32: twice the bytes of an accelerator's."""
    train = dataclasses.replace(
        config.train, dtype="float8", float8_targets=("gate", "out"), accumulation_steps=1
    )
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=8), train=train)
    step = compilation.abstract_step(config, absent_devices("cpu:8", config.backend))
    program = compilation.lowered_step(step).compile({"xla_backend_optimization_level": 0})
    told = 0.0
    for row in traffic(Program(program.as_text()), step.mesh, [0] * 8):
        told += row.sent_bytes / (1 if row.kind == "reduce-scatter" else 2)
    sizes, m = dict(step.mesh.shape), config.model
    assert estimate.sent_bytes(config, sizes)[("fsdp",)] == pytest.approx(told, rel=0.01)
    # gate and out, of 1 byte; query, key, value, up and down of 2; and all gradients of 4
    wide = m.num_heads * m.head_size
    gathered = wide * 1 + (wide + 2 * m.num_kv_heads * m.head_size) * 2
    gathered += m.intermediate_size * (1 + 2 + 2)
    gradients = 4 * matrices_per_layer(m)
    found = held_parts(config, sizes)["gathered weights"]
    assert found == pytest.approx(gathered * m.hidden_size + gradients)


def test_scales_by_rows_read_and_write_more_than_those_by_tensor():
    """731 GB a step of Llama2-7B on h100:8 (benchmarks/program_bytes.py, jax 0.12, 2026-11-30)."""
    sizes = {"data": 1, "stage": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    by_rows, by_tensor = (
        roofline.memory_bytes(
            load("llama2_7b", {"train.dtype": "float8", "train.float8_scaling": scaling}), sizes
        )
        for scaling in ("row", "tensor")
    )
    assert by_rows - by_tensor == pytest.approx(731e9, rel=0.2)


def test_adapters_and_their_moments_are_divided_by_stage():
    config = load(str(Path(__file__).with_name("small_run.py")))
    axes = {"stage": 2, "fsdp": 2, "tensor": 2}
    lora = dataclasses.replace(config.lora, rank=64, base_dtype="bfloat16")
    config = dataclasses.replace(config, mesh=MeshConfig(**axes), lora=lora)
    step = compilation.abstract_step(config, absent_devices("cpu:8", config.backend))
    held = shard_bytes((step.state.model, step.state.adapters, step.state.opt_state))
    assert state_bytes(config, dict(step.mesh.shape)) == pytest.approx(held, rel=0.03)


def test_a_pass_hides_no_more_than_its_own_products_take(config, table):
    """70B's gradients take longer to send than the backward pass runs."""
    h100 = dataclasses.replace(table["h100"], float32=100e12)
    sizes = {"data": 1, "stage": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
    free = roofline.predict(config, sizes, h100, {}, attention="xla")
    for share, hidden in ((0.1, 0.1), (100.0, 1.0)):
        sent = {("fsdp",): share * free.products_s, ("tensor",): 1.0}
        found = roofline.predict(config, sizes, h100, sent, attention="xla")
        assert found.hidden_s == pytest.approx(hidden * free.products_s)
    # float32: a third is sent in the forward pass, which runs a quarter of the products with `full`
    sent = {("fsdp",): free.products_s}
    found = roofline.predict(config, sizes, h100, sent, attention="xla")
    assert 0.9 * free.products_s < found.hidden_s < 0.97 * free.products_s
    told = roofline.predict(config, sizes, h100, sent, attention="xla", waits_s=0.0)
    assert told.hidden_s == pytest.approx(free.products_s)


def test_links_work_at_the_same_time_and_the_slower_decides(table):
    v5p, v4 = table["v5p"], table["v4"]
    fast, slow = v5p.fast_bytes_per_s, v5p.slow_bytes_per_s
    assert (fast, slow) == (180e9, 6.25e9)
    assert roofline.link_seconds(fast, 0, v5p) == 1
    assert roofline.link_seconds(4 * slow, 2 * slow, v5p) == 2
    assert roofline.link_seconds(3 * fast, slow / 2, v5p) == 3
    assert roofline.link_seconds(1e9, 0, v4) > 0
    assert roofline.link_seconds(1e9, 1, v4) == math.inf  # its network is unknown
