"""One step is the same step on every mesh, in microbatches, under every remat policy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax import optim, sharding
from llamajax.config.schema import MeshConfig, ModelConfig, OptimConfig, TrainConfig
from llamajax.models.llama import Compute
from llamajax.models.remat import REMAT
from llamajax.training.state import TrainState, abstract_state
from llamajax.training.step import eval_step, train_step

MODEL = ModelConfig(
    vocab_size=97,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_size=4,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    init_std=0.2,
    max_seq_len=64,
)
# An epsilon far above the gradients makes Adam's updates proportional to them: with a small one
# the update of a gradient that is nearly zero would be its sign, and rounding would show.
OPTIM = OptimConfig(
    learning_rate=0.1,
    warmup_steps=0,
    schedule="constant",
    final_learning_rate=0.1,
    beta1=0.9,
    beta2=0.95,
    epsilon=0.1,
    weight_decay=0.1,
    clip_norm=1.0,
)
TRAIN = TrainConfig(steps=10, seed=0, dtype="float32")
COMPUTE = Compute(dtype=jnp.dtype("float32"), remat="full", attention="xla", loss_chunk_tokens=12)
B, T, STEPS = 16, 8, 2
# Half the time of these tests; what is compared is the partitioned program, not LLVM's work on it.
FAST_COMPILE = {"xla_backend_optimization_level": 0}
# Each axis alone and all three; pairs are in the tests of microbatches, of z-loss and of one trace.
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2)]


def packed_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Two documents a row and padding, with very unequal numbers of targets in the rows."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, MODEL.vocab_size, (B, T + 1)).astype(np.int32)
    border = rng.integers(1, T, (B, 1))
    after, at = np.arange(T) >= border, np.arange(T)
    used = at < np.where(np.arange(B) < 5, 1, T)[:, None]  # one token in the first five rows
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.where(after, at - border, at).astype(np.int32),
        "segment_ids": np.where(used, 1 + after, 0).astype(np.int32),
        "loss_mask": used & (at != border - 1),
    }


def drawn_state(model: ModelConfig, optimizer, mesh) -> TrainState:
    """A state whose weights NumPy draws: a program that does takes longer to compile than a step.

    That `init_state` gives every mesh the same weights is in `test_init.py`.
    """
    abstract, rng = abstract_state(model, optimizer, mesh), np.random.default_rng(3)

    def draw(leaf):
        rows = leaf.shape[0] == model.padded_vocab_size
        value = rng.normal(0.0 if rows or leaf.ndim > 2 else 1.0, model.init_std, leaf.shape)
        if rows:
            value[model.vocab_size :] = 0
        return value.astype(np.float32)

    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    state = zeros.replace(model=jax.tree.map(draw, abstract.model))
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))


@functools.cache
def run(mesh_shape, *, tied=False, accumulation=1, steps=STEPS, **options):
    """Metrics of each step, and the weights after the last, by name."""
    data, fsdp, tensor = mesh_shape
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = sharding.build_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)
    model = dataclasses.replace(MODEL, tie_embeddings=tied)
    sharding.check_divides(model.dims, mesh, batch=B, accumulation=accumulation)
    optimizer = optim.build(OPTIM, steps=TRAIN.steps)
    state = drawn_state(model, optimizer, mesh)
    train = dataclasses.replace(TRAIN, accumulation_steps=accumulation)
    compute = dataclasses.replace(COMPUTE, **options)
    step = jitted = train_step(optimizer, OPTIM, train, compute, mesh)
    batches, rows = [sharding.place(packed_batch(n), mesh) for n in range(steps)], []
    if steps == STEPS:  # the others are there to be traced
        step = jitted.lower(state, batches[0]).compile(compiler_options=FAST_COMPILE)
    for batch in batches:
        state, metrics = step(state, batch)
        rows.append({name: value.item() for name, value in metrics.items()})
    weights = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.model)
    }
    return rows, weights, jitted._cache_size()


def assert_same(found, expected, *, rtol=1e-5):
    for row, wanted in zip(found[0], expected[0], strict=True):
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, rel=rtol), name
    for name, value in expected[1].items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(found[1][name], value, rtol=0, atol=rtol * scale, err_msg=name)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mesh_takes_the_step_of_one_device(shape):
    assert_same(run(shape), run((1, 1, 1)))


def test_a_tied_model_takes_the_step_of_one_device():
    assert_same(run((2, 2, 2), tied=True), run((1, 1, 1), tied=True))


def test_the_loss_is_the_mean_over_all_targets_of_the_batch():
    rows, _, _ = run((2, 2, 2))
    for n, row in enumerate(rows):
        assert row["target_tokens"] == packed_batch(n)["loss_mask"].sum()
    counts = packed_batch()["loss_mask"].reshape(4, -1).sum(axis=1)
    assert counts.max() > 2 * counts.min(), "a mean of the shards' means would differ"


def test_microbatches_add_up_to_the_batch():
    assert_same(run((1, 2, 2), accumulation=4), run((1, 1, 1)))


@pytest.mark.parametrize("remat", sorted(set(REMAT) - {"full", "save_attention"}))
def test_what_is_recomputed_changes_nothing(remat):
    assert_same(run((1, 2, 1), remat=remat), run((1, 1, 1)))


def test_blocked_attention_is_the_same_attention():
    found = run((1, 1, 1), attention="blocked", remat="save_attention")  # made for each other
    assert_same(found, run((1, 1, 1)))


def test_z_loss_moves_the_weights_and_stays_out_of_the_loss():
    (first, _), weights, _ = run((2, 1, 2), z_weight=1.0)
    (plain, _), plain_weights, _ = run((1, 1, 1))
    assert first["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert first["z_loss"] > 0
    assert "z_loss" not in plain
    assert max(np.abs(weights[k] - plain_weights[k]).max() for k in weights) > 1e-4


def test_five_steps_are_traced_once():
    rows, _, traces = run((2, 2, 1), steps=5)
    assert len(rows) == 5
    assert traces == 1
    for row, wanted in zip(rows[:STEPS], run((1, 1, 1))[0], strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)


def test_bfloat16_is_close_to_float32():
    rows, _, _ = run((2, 2, 2), dtype=jnp.dtype("bfloat16"))
    exact, _, _ = run((1, 1, 1))
    for row, wanted in zip(rows, exact, strict=True):
        assert row["loss"] != wanted["loss"]
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-2)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=5e-2)


def test_evaluation_sums_the_loss_of_the_first_step():
    mesh = sharding.build_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    state = drawn_state(MODEL, optim.build(OPTIM, steps=10), mesh)
    nll, count = eval_step(COMPUTE, mesh)(state.model, sharding.place(packed_batch(), mesh))
    (first, _), _, _ = run((1, 1, 1))
    assert float(nll / count) == pytest.approx(first["loss"], rel=1e-5)
    assert float(count) == first["target_tokens"]
