"""The same steps on every mesh of 8 devices: all 35 ways to put 8 on five axes.

Packed documents and two microbatches of accumulation everywhere; for pipelines also uneven layers,
interleaved rounds and larger microbatches. A stated tolerance (`stepping.assert_same`): losses,
gradient norms and weights after five steps differ by less than 1e-5 of their largest value.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from meshes import mesh_of
from stepping import B, T, assert_same, run

import llamajax.models.sharded_step
from llamajax.models.layer_order import pipeline_order
from llamajax.models.pipeline import bubble, local_microbatches, num_ticks
from llamajax.ops import attention_split
from llamajax.ops.attention import attention
from llamajax.ops.attention_split import local_tokens, pair_table

AXES = ("data", "fsdp", "sequence", "tensor", "stage")
STEPS = 5
SIZES = [n for n in itertools.product((1, 2, 4, 8), repeat=len(AXES)) if math.prod(n) == 8]
# In every run of the tests: each pair of axes is in one of them. The others are in the whole suite.
FIRST = {
    (2, 2, 2, 1, 1), (2, 2, 1, 2, 1), (1, 2, 1, 2, 2), (1, 1, 2, 2, 2), (1, 1, 4, 2, 1),
    (2, 1, 1, 1, 4),
}  # fmt: skip


def mesh_case(sizes):
    case = tuple((axis, n) for axis, n in zip(AXES, sizes, strict=True) if n > 1)
    name = "-".join(f"{axis}{n}" for axis, n in case)
    return pytest.param(case, id=name, marks=[] if sizes in FIRST else [pytest.mark.slow])


@pytest.mark.parametrize("axes", [mesh_case(sizes) for sizes in SIZES])
def test_every_mesh_takes_the_steps_of_one_device(axes):
    assert len(SIZES) == 35
    layers = 8 if dict(axes).get("stage") == 8 else 4
    options = {"accumulation": 2, "steps": STEPS, "layers": layers}
    assert_same(run(*axes, **options), run(**options))


MUON = (("name", "muon"), ("learning_rate", 0.02))
MUON_MESHES = [({"data": 2, "fsdp": 2, "tensor": 2}, {"layers": 3, "accumulation": 2})]
MORE_MUON = [
    ({"stage": 2, "fsdp": 2, "sequence": 2}, {"layers": 5, "rounds": 2, "accumulation": 2}),
    ({"fsdp": 8}, {}),
    ({"tensor": 4, "sequence": 2}, {}),
    ({"data": 8}, {}),
    ({"stage": 4, "tensor": 2}, {"layers": 4}),
]


@pytest.mark.parametrize(
    ("axes", "options"),
    [*MUON_MESHES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_MUON)],
    ids=str,
)
def test_muon_takes_the_steps_of_one_device_on_every_mesh(axes, options):
    """Newton-Schulz multiplies small singular values by up to 3.44**5, and rounding with them."""
    found = run(*axes.items(), steps=STEPS, optimizer=MUON, **options)
    same = {k: options[k] for k in ("layers",) if k in options}
    assert_same(found, run(steps=STEPS, optimizer=MUON, **same), rtol=1e-4)


PIPELINES = [
    ({"stage": 2, "sequence": 2}, {"layers": 3}),
    ({"stage": 2, "fsdp": 2}, {"rounds": 2, "layers": 5, "remat": "none", "tied": True}),
]
MORE_PIPELINES = [
    ({"stage": 2, "fsdp": 2, "tensor": 2}, {"rounds": 2, "layers": 4}),
    ({"stage": 4, "data": 2}, {"layers": 8, "rounds": 2, "accumulation": 1}),
    ({"stage": 4, "fsdp": 2}, {"layers": 5, "microbatch_size": 2, "accumulation": 1}),
    ({"stage": 2, "tensor": 2}, {"remat_stage": False, "remat": "dots"}),
]


@pytest.mark.parametrize(
    ("axes", "options"),
    [*PIPELINES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_PIPELINES)],
    ids=str,
)
def test_every_pipeline_takes_the_steps_of_one_device(axes, options):
    found = run(*axes.items(), steps=2, **({"accumulation": 2} | options))
    same = {k: options[k] for k in ("layers", "tied") if k in options}
    assert_same(found, run(steps=2, **same))


@pytest.mark.parametrize(
    "axes",
    [("sequence", "tensor"), pytest.param(("fsdp", "data"), marks=pytest.mark.slow)],
    ids=str,
)
def test_the_same_without_the_check_of_varying_axes(axes, monkeypatch):
    """Kernels that cannot be checked run so: no derivative may rest on what the check inserts."""
    monkeypatch.setattr(llamajax.models.sharded_step, "needs_unchecked", lambda impl: True)
    sizes = {"stage": 2} | dict.fromkeys(axes, 2)
    found = run(*sizes.items(), steps=2, layers=4, loss_chunk_tokens=21)
    assert_same(found, run(steps=2, layers=4))


def test_layers_of_zeros_stay_zeros():
    _, weights, _ = run(("stage", 2), ("sequence", 2), steps=2, layers=3, accumulation=2)
    assert all(value.shape[0] == 3 for name, value in weights.items() if "blocks" in name)
    assert pipeline_order(3, stages=2, rounds=1).tolist() == [0, 1, 2, 3]
    assert pipeline_order(4, stages=2, rounds=2).tolist() == [0, 2, 1, 3]
    assert pipeline_order(5, stages=2, rounds=2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_bubble_of_a_pipeline():
    """Llama3-70B in the ancestor's layout: 8 stages, 32 microbatches a device, then in 2 rounds."""
    assert bubble(stages=8, microbatches=32, rounds=1) == pytest.approx(7 / 39)
    assert bubble(stages=8, microbatches=32, rounds=2) == pytest.approx(7 / 71)
    assert num_ticks(stages=1, microbatches=5, rounds=1) == 5


def local_on(mesh_sizes, function, *arrays, out):
    run = jax.shard_map(
        function, mesh=mesh_of(**mesh_sizes), in_specs=PartitionSpec(), out_specs=out
    )
    return jax.tree.map(np.asarray, jax.jit(run)(*arrays))


TOKENS = PartitionSpec(None, "sequence")


def in_sequence(x, parts):
    """Columns device by device, (front 0, back 0, front 1, ...), in the order of the sequence."""
    pieces = np.split(x, 2 * parts, axis=1)
    return np.concatenate(pieces[::2] + pieces[::-2], axis=1)


def test_every_token_is_owned_once():
    x = np.arange(B * T, dtype=np.float32).reshape(B, T)
    own = local_on({"sequence": 4}, local_tokens, x, out=TOKENS)
    piece = T // 8
    first = [*range(piece), *range(T - piece, T)]
    np.testing.assert_array_equal(own[:, : T // 4], x[:, first])
    np.testing.assert_array_equal(in_sequence(own, 4), x)

    def rows(x):
        return local_microbatches(x, microbatch_size=2)

    own = local_on({"stage": 4}, rows, x, out=PartitionSpec("stage"))
    np.testing.assert_array_equal(own[: B // 4], x[[0, 1, 8, 9]])
    assert sorted(own.reshape(-1).tolist()) == x.reshape(-1).tolist()


def test_devices_along_a_sequence_do_equal_work():
    """As many pairs of blocks on each, together exactly the causal triangle of blocks."""
    table = pair_table(96, 4, 4)
    assert table.shape[0] == 4
    blocks = 96 // 4
    visited = {(q, k) for device in table for _, q, k in device}
    assert visited == {(q, k) for q in range(blocks) for k in range(q + 1)}
    assert table.shape[1] * 4 == len(visited)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_split_attention_is_attention(parts, monkeypatch):
    """Values and gradients, several blocks a piece, documents across all borders."""
    monkeypatch.setattr(attention_split, "MAX_BLOCK", 2)
    rng, (N, K, H), tokens = np.random.default_rng(1), (6, 2, 5), 32
    q, k, v, do = (rng.normal(size=(2, tokens, n, H)).astype(np.float32) for n in (N, K, K, N))
    ids = np.sort(rng.integers(0, 4, (2, tokens)), axis=1).astype(np.int32)

    def whole(q, k, v):
        return attention(q, k, v, impl="xla", segment_ids_BT=jnp.asarray(ids))

    expected, pull = jax.vjp(whole, q, k, v)
    expected = (expected, *pull(do))

    def split(q, k, v, do, ids):
        own = [local_tokens(a) for a in (q, k, v, do)]
        o, pull = jax.vjp(lambda *qkv: attention(*qkv, impl="split", segment_ids_BT=ids), *own[:3])
        return o, *pull(own[3])

    found = local_on({"sequence": parts}, split, q, k, v, do, ids, out=TOKENS)
    for got, want in zip(found, expected, strict=True):
        got = in_sequence(got, parts)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())
