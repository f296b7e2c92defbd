"""Adapters: nothing at the start, the merged formula afterwards, the same on every mesh."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from plain_batch import plain_batch
from stepping import FAST_COMPILE, OPTIM
from tiny_model import COMPUTE, draw_like, draw_llama, named_arrays, tiny_model

from llamajax import optim, sharding
from llamajax.config.presets import PRESETS
from llamajax.config.schema import LORA_TARGETS, LoraConfig, TrainConfig
from llamajax.models import sharded_step
from llamajax.models.counts import flops_per_token
from llamajax.models.llama import Llama
from llamajax.models.lora import attach, detach, init_adapters, merge, num_adapter_parameters
from llamajax.ops.dropout import dropout
from llamajax.training.state import StateSpec
from llamajax.training.step import train_step

MODEL = tiny_model(head_size=6, rope_theta=12_345.0, init_std=0.2)
LORA = LoraConfig(rank=3, alpha=6.0)
# Split by columns (N, and K), by rows (N, and F): one of each, to compile less.
TARGETS = ("query", "value", "out", "down")
B, T, STEPS = 8, 8, 5
UNCHECKED = {"base_dtype": "bfloat16", "checked": False}


def batch(seed: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, MODEL.vocab_size, (B, T + 1))
    return plain_batch(tokens)


@functools.cache
def base_model() -> Llama:
    return draw_llama(MODEL, 3, std=0.2)


def trained_adapters(lora: LoraConfig = LORA):
    """Adapters with a B that is not zero."""
    init = functools.partial(init_adapters, MODEL, lora)
    return draw_like(jax.eval_shape(init, jax.random.key(0)), 6, std=0.3)


def logits(model: Llama) -> np.ndarray:
    return np.asarray(jax.jit(lambda m: m.logits(batch(0), COMPUTE))(model))


@functools.cache
def run(mesh_shape, *, dropout=0.0, accumulation=1, base_dtype="float32", checked=True):
    """Losses and gradient norms of five steps, the state after them, the base before them.

    One compiled program takes all five: it would refuse a state that is placed another way.
    """
    axes = ("data", "fsdp", "tensor", "sequence", "stage")
    mesh = mesh_of(**dict(zip(axes, mesh_shape, strict=False)))
    compute = dataclasses.replace(
        COMPUTE,
        split_tokens=mesh.shape["tensor"] > 1,
        attention="split" if mesh.shape["sequence"] > 1 else "xla",
    )
    lora = dataclasses.replace(LORA, dropout=dropout, base_dtype=base_dtype, targets=TARGETS)
    optimizer = optim.build(OPTIM, steps=10)
    base = jax.tree.map(lambda x: x.astype(base_dtype) if x.ndim > 2 else x, base_model())
    before = jax.tree.map(np.asarray, base)
    model = jax.device_put(base, sharding.shardings(base, mesh))
    spec = StateSpec(model=MODEL, optimizer=optimizer, mesh=mesh, lora=lora)
    state = spec.from_weights(model, 4)
    train = TrainConfig(steps=10, seed=7, dtype="float32", accumulation_steps=accumulation)
    step = train_step(optimizer, OPTIM, train, compute, mesh)
    batches, rows = [sharding.put_batch(batch(n), mesh) for n in range(STEPS)], []
    with mock.patch.object(sharded_step, "needs_unchecked", return_value=not checked):
        step = step.lower(state, batches[0]).compile(compiler_options=FAST_COMPILE)
        for placed in batches:
            state, metrics = step(state, placed)
            rows.append([metrics["loss"].item(), metrics["grad_norm"].item()])
    return np.array(rows), state, before


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    ours, theirs = (jax.tree.map(np.asarray, x[1].adapters) for x in (found, expected))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_fresh_adapters_leave_the_model_exactly_as_it_is():
    model = base_model()
    lora = dataclasses.replace(LORA, targets=TARGETS)
    adapters = jax.jit(functools.partial(init_adapters, MODEL, lora))(jax.random.key(5))
    assert np.abs(adapters["out"].a[...]).max() == pytest.approx(24**-0.5, rel=0.1)  # N x H inputs
    np.testing.assert_array_equal(logits(attach(model, adapters)), logits(model))
    assert np.abs(logits(attach(model, trained_adapters())) - logits(model)).max() > 0.1


def test_attaching_changes_no_other_model_and_can_be_undone():
    model = base_model()
    adapters = trained_adapters()
    base, found = detach(attach(model, adapters))
    assert jax.tree.structure(base) == jax.tree.structure(model)
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    assert model.blocks.mlp.down_lora is None


def test_merged_weights_compute_the_same_and_have_the_same_gradients():
    """Of every A and B, against plain autodiff of W + alpha / r A B on one device."""
    model, adapters = base_model(), trained_adapters()

    def beside(adapters):
        return attach(model, adapters).loss_terms(batch(0), COMPUTE).objective

    def merged(adapters):
        whole = merge(attach(model, adapters), dtype=jnp.dtype("float32"))
        return whole.loss_terms(batch(0), COMPUTE).objective

    (loss, grads), (expected, expected_grads) = (
        jax.jit(jax.value_and_grad(f))(adapters) for f in (beside, merged)
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 2, 2), {}),
        pytest.param((1, 2, 2), {"accumulation": 2}, marks=pytest.mark.slow),
        pytest.param((1, 1, 2, 2, 2), {}, marks=pytest.mark.slow),
    ],
    ids=["batch and width", "microbatches", "tokens and layers"],
)
def test_every_mesh_drops_the_same_and_trains_the_same_adapters(shape, options):
    assert_same(run(shape, dropout=0.3, **options), run((1, 1, 1), dropout=0.3))


@pytest.mark.parametrize(
    "shape", [(2, 2, 2), pytest.param((1, 1, 2, 2, 2), marks=pytest.mark.slow)], ids=str
)
def test_every_mesh_trains_the_same_adapters_where_varying_axes_are_not_checked(shape):
    """As with a fused kernel: JAX then inserts no sum of a gradient that was forgotten."""
    assert_same(run(shape, **UNCHECKED), run((1, 1, 1), **UNCHECKED))


@pytest.mark.parametrize("options", [{"dropout": 0.3}, UNCHECKED], ids=str)
def test_only_adapters_change_and_only_they_have_an_optimizer(options):
    rows, state, before = run((2, 2, 2), **options)
    assert rows[-1, 0] != rows[0, 0]
    for now, then in zip(jax.tree.leaves(state.model), jax.tree.leaves(before), strict=True):
        assert now.dtype == then.dtype
        np.testing.assert_array_equal(np.asarray(now), then)
    sizes = [leaf.size for leaf in jax.tree.leaves(state.adapters)]
    lora = dataclasses.replace(LORA, targets=TARGETS)
    assert sum(sizes) == num_adapter_parameters(MODEL, lora)
    moments = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sorted(moments) == sorted(2 * sizes)


def test_dropout_needs_keys_and_follows_them():
    lora = dataclasses.replace(LORA, dropout=0.3, targets=("up",))
    model = attach(base_model(), trained_adapters(lora))
    plain = attach(base_model(), trained_adapters(dataclasses.replace(lora, dropout=0.0)))

    @jax.jit
    def nll(model, keys):
        found = {} if keys is None else {"dropout_keys": keys}
        return model.loss_terms(batch(0) | found, COMPUTE).nll

    def loss(model, seed=None):
        keys = None if seed is None else jax.random.split(jax.random.key(seed), (B, T))
        return nll(model, keys).item()

    assert loss(model) == loss(plain) == loss(plain, 0)
    assert loss(model, 0) == loss(model, 0)
    assert len({loss(model, seed) for seed in (0, 1)} | {loss(plain)}) == 3


def test_dropout_keeps_the_mean_and_depends_on_the_token_alone():
    keys = jax.random.split(jax.random.key(0), (2, 3))
    x = jnp.ones((2, 3, 4, 500))
    kept = np.asarray(dropout(x, keys, rate=0.25, split=False))
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.75)}
    assert kept.mean() == pytest.approx(1.0, abs=0.02)
    one = np.asarray(dropout(x[:, 1:], keys[:, 1:], rate=0.25, split=False))
    np.testing.assert_array_equal(one, kept[:, 1:])


def test_the_published_number_of_weights():
    """Rank 16 on every matrix of Llama-2 7B; PEFT counts as many."""
    assert num_adapter_parameters(PRESETS["llama2-7b"], LoraConfig(rank=16)) == 39_976_960


def test_frozen_weights_cost_two_products_of_three():
    trained, frozen = (flops_per_token(MODEL, 8, causal=False, frozen=f) for f in (False, True))
    attention = 3 * 4 * 8 * MODEL.num_heads * MODEL.head_size * MODEL.num_layers
    assert (frozen - attention) * 3 == (trained - attention) * 2


def test_a_target_is_adapted_alone():
    for target in LORA_TARGETS:
        adapters = trained_adapters(dataclasses.replace(LORA, targets=(target,)))
        merged = named_arrays(merge(attach(base_model(), adapters), dtype=jnp.dtype("float32")))
        before = named_arrays(base_model()).items()
        (changed,) = (name for name, x in before if not np.array_equal(x, merged[name]))
        assert f".{target}" in changed
