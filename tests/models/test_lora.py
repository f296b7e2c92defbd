"""Adapters: nothing at the start, the merged formula afterwards, the same on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stepping
from meshes import mesh_of
from plain_batch import plain_batch
from stepping import OPTIM, assert_same, drawn_state, run
from tiny_model import COMPUTE, draw_like, draw_llama, named_arrays, tiny_model

from llamajax import optim
from llamajax.config.presets import PRESETS
from llamajax.config.schema import LORA_TARGETS, LoraConfig
from llamajax.models import sharded_step
from llamajax.models.counts import flops_per_token
from llamajax.models.llama import Llama
from llamajax.models.lora import attach, detach, init_adapters, merge, num_adapter_parameters
from llamajax.ops.dropout import dropout
from llamajax.training.state import StateSpec

MODEL = tiny_model(head_size=6, rope_theta=12_345.0, init_std=0.2)
LORA = LoraConfig(rank=3, alpha=6.0)
# Split by columns (N, and K), by rows (N, and F): one of each, to compile less.
TARGETS = ("query", "value", "out", "down")
DROPPING = dataclasses.replace(LORA, dropout=0.3, targets=TARGETS)
HALVED = dataclasses.replace(LORA, base_dtype="bfloat16", targets=TARGETS)
EIGHT = {"data": 2, "fsdp": 2, "tensor": 2}
B, T = 8, 8
BATCH = plain_batch(np.random.default_rng(0).integers(0, MODEL.vocab_size, (B, T + 1)))


@functools.cache
def base_model() -> Llama:
    return draw_llama(MODEL, 3, std=0.2)


def trained_adapters(lora: LoraConfig = LORA):
    """Adapters with a B that is not zero."""
    init = functools.partial(init_adapters, MODEL, lora)
    return draw_like(jax.eval_shape(init, jax.random.key(0)), 6, std=0.3)


def logits(model: Llama) -> np.ndarray:
    return np.asarray(jax.jit(lambda m: m.logits(BATCH, COMPUTE))(model))


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
        return attach(model, adapters).loss_terms(BATCH, COMPUTE).objective

    def merged(adapters):
        whole = merge(attach(model, adapters), dtype=jnp.dtype("float32"))
        return whole.loss_terms(BATCH, COMPUTE).objective

    (loss, grads), (expected, expected_grads) = (
        jax.jit(jax.value_and_grad(f))(adapters) for f in (beside, merged)
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        (EIGHT, {}),
        pytest.param({"fsdp": 2, "tensor": 2}, {"accumulation": 2}, marks=pytest.mark.slow),
        pytest.param({"tensor": 2, "sequence": 2, "stage": 2}, {}, marks=pytest.mark.slow),
    ],
    ids=["batch and width", "microbatches", "tokens and layers"],
)
def test_every_mesh_drops_the_same_and_trains_the_same_adapters(axes, options):
    assert_same(run(*axes.items(), lora=DROPPING, **options), run(lora=DROPPING))


@pytest.mark.parametrize(
    "axes",
    [EIGHT, pytest.param({"tensor": 2, "sequence": 2, "stage": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_every_mesh_trains_the_same_adapters_where_varying_axes_are_not_checked(axes, monkeypatch):
    """As with a fused kernel: JAX then inserts no sum of a gradient that was forgotten."""
    monkeypatch.setattr(sharded_step, "needs_unchecked", lambda impl: True)
    assert_same(run(*axes.items(), lora=HALVED), run(lora=HALVED))


@pytest.mark.parametrize("lora", [DROPPING, HALVED], ids=["dropout", "bfloat16"])
def test_only_adapters_change_and_only_they_have_an_optimizer(lora, monkeypatch):
    optimizer = optim.build(OPTIM, steps=10)
    spec = StateSpec(model=stepping.MODEL, optimizer=optimizer, mesh=mesh_of(), lora=lora)
    before = drawn_state(spec)
    if lora is HALVED:
        monkeypatch.setattr(sharded_step, "needs_unchecked", lambda impl: True)
    _, after, _ = run(*EIGHT.items(), lora=lora)
    for name, value in named_arrays(before.model).items():
        np.testing.assert_array_equal(after[name], value.astype(np.float32))
    for name, value in named_arrays(before.adapters).items():
        assert np.abs(after[name] - value).max() > 1e-4
    sizes = [leaf.size for leaf in jax.tree.leaves(before.adapters)]
    assert sum(sizes) == num_adapter_parameters(stepping.MODEL, lora)
    moments = [leaf.size for leaf in jax.tree.leaves(before.opt_state) if leaf.ndim]
    assert sorted(moments) == sorted(2 * sizes)


def test_dropout_needs_keys_and_follows_them():
    lora = dataclasses.replace(LORA, dropout=0.3, targets=("up",))
    model = attach(base_model(), trained_adapters(lora))
    plain = attach(base_model(), trained_adapters(dataclasses.replace(lora, dropout=0.0)))

    @jax.jit
    def nll(model, keys):
        found = {} if keys is None else {"dropout_keys": keys}
        return model.loss_terms(BATCH | found, COMPUTE).nll

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
