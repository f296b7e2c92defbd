"""The formulas that a search ranks by, against compiled programs: bytes sent, state, products."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import pytest

from llamajax.backends import absent_devices
from llamajax.config import MeshConfig, load
from llamajax.models.memory import held_bytes, state_bytes
from llamajax.planning import compilation, estimate, hlo, roofline

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
}
# Every axis is in one of these; the others are in the whole suite.
FIRST = ("sequence-tensor", "stage-tensor", "stage-rounds", "fsdp-none")
each_case = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FIRST else [pytest.mark.slow]) for name in CASES],
)


@functools.cache
def compiled(name):
    """(config, axis sizes, step, text, bytes of arguments) of a case on virtual CPU devices."""
    axes, remat, accumulation, rounds, microbatch_size = CASES[name]
    layers = 6 if name == "stage-uneven" else 4
    attention = "auto" if "sequence" in axes else "xla"
    small = load(str(Path(__file__).with_name("small_run.py")))
    config = dataclasses.replace(
        small,
        model=dataclasses.replace(small.model, num_layers=layers),
        mesh=MeshConfig(**axes),
        train=dataclasses.replace(
            small.train, remat=remat, accumulation_steps=accumulation, attention=attention,
            pipeline_rounds=rounds, microbatch_size=microbatch_size,
        ),
    )  # fmt: skip
    step = compilation.abstract_step(config, absent_devices("cpu:8", config.backend))
    found = compilation.lowered_step(step).compile({"xla_backend_optimization_level": 0})
    arguments = found.memory_analysis().argument_size_in_bytes
    return config, dict(step.mesh.shape), step, found.as_text(), arguments


@each_case
def test_bytes_sent_along_every_axis_are_those_of_the_program(name):
    config, sizes, step, text, _ = compiled(name)
    real: dict[tuple[str, ...], float] = {}
    for row in compilation.traffic(text, step.mesh):
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


def product_flops(text):
    """Operations of one device's products with weights: those without a batch dimension."""

    def dims(type_):
        return [int(n) for n in re.search(r"\[([\d,]+)\]", type_)[1].split(",")]

    total = 0
    for _, instructions, times in hlo.executed(text):
        types = {i.name: i.result for i in instructions}
        for i in instructions:
            if i.operation == "dot" and "lhs_batch_dims" not in i.attributes:
                left = dims(types[i.operands[0]])
                summed = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", i.attributes)[1]
                each = math.prod(left[int(n)] for n in summed.split(","))
                total += 2 * times * math.prod(dims(i.result)) * each
    return total


@each_case
def test_products_are_those_of_the_program(table, name):
    """With the blocks that idle ticks of a pipeline run on nothing."""
    config, sizes, _, text, _ = compiled(name)
    h100 = dataclasses.replace(table["h100"], float32=1.0, efficiency=1.0)
    found = roofline.predict(config, sizes, h100, {}, attention="xla")
    pipe = roofline.pipeline_facts(config, sizes)
    bubble = pipe.bubble if pipe else 0.0
    idle = found.bubble_s - found.attention_s * bubble / (1 - bubble)
    assert product_flops(text) == pytest.approx(found.products_s + idle, rel=0.03)


def test_links_work_at_the_same_time_and_the_slower_decides(table):
    v5p, v4 = table["v5p"], table["v4"]
    fast, slow = v5p.fast_bytes_per_s, v5p.slow_bytes_per_s
    assert (fast, slow) == (180e9, 6.25e9)
    assert roofline.link_seconds(fast, 0, v5p) == 1
    assert roofline.link_seconds(4 * slow, 2 * slow, v5p) == 2
    assert roofline.link_seconds(3 * fast, slow / 2, v5p) == 3
    assert roofline.link_seconds(1e9, 0, v4) > 0
    assert roofline.link_seconds(1e9, 1, v4) is None  # its network is unknown
