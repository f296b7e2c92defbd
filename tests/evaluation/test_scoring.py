"""The loss of each token on any mesh, in any batch size, against plain logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from tiny_model import COMPUTE, tiny_model

from llamajax import sharding
from llamajax.evaluation.scoring import perplexity, rows_a_batch, score, token_scores
from llamajax.evaluation.windows import WindowRows, sliding_window
from llamajax.models.llama import Llama

CONFIG = tiny_model(vocab_size=131, rope_theta=12_345.0, norm_eps=1e-4, init_std=0.4)
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 61).astype(np.int32)
ROWS = WindowRows(IDS, sliding_window(len(IDS), 13, 5))
TOLERANCE = 1e-5  # nats, of losses of several nats: float32, sums in another order


@functools.cache
def model() -> Llama:
    return Llama(CONFIG, jax.random.key(0))


@functools.cache
def expected() -> np.ndarray:
    """Loss of each scored token, from the logits of one window at a time, in float64."""
    logits = jax.jit(lambda weights, batch: weights.logits(batch, COMPUTE))
    found = []
    for number in range(ROWS.num_rows):
        batch = ROWS.batch(range(number, number + 1))
        scores = np.asarray(logits(model(), jax.tree.map(jnp.asarray, batch)), np.float64)[0]
        target = np.take_along_axis(scores, batch["targets"][0][:, None], axis=1)[:, 0]
        losses = np.log(np.exp(scores).sum(axis=1)) - target
        found.append(losses[batch["loss_mask"][0]])
    return np.concatenate(found)


def run(shape: dict[str, int], batch_size: int, **options):
    mesh = mesh_of(**shape)
    placed = jax.device_put(model(), sharding.shardings(model(), mesh))
    batch_size, shown = rows_a_batch(ROWS, mesh, batch_size), []
    whole = {"num_batches": -(-ROWS.num_rows // batch_size), "keep": True}
    options = whole | options | {"batch_size": batch_size, "show": shown.append}
    attention = "split" if mesh.shape["sequence"] > 1 else COMPUTE.attention
    changes = {"attention": attention, "split_tokens": mesh.shape["tensor"] > 1}
    compute = dataclasses.replace(COMPUTE, **changes)
    return score(placed, ROWS, mesh=mesh, run=token_scores(compute, mesh), **options), shown


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_padding_never_counts(batch_size):
    assert ROWS.num_rows == 11, "so that 3, 7 and 100 end in padding"
    found, shown = run({}, batch_size)
    assert found.tokens == len(IDS) - 1
    np.testing.assert_allclose(found.per_token, expected(), rtol=0, atol=TOLERANCE)
    assert found.nll == pytest.approx(expected().sum(), rel=1e-6)
    assert shown[-1]["loss"] == found.nll / found.tokens


@pytest.mark.parametrize(
    "shape",
    [
        {"data": 2},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"sequence": 2, "tensor": 2},
        {"stage": 2, "fsdp": 2, "sequence": 2},
    ],
    ids=str,
)
def test_every_mesh_gives_the_same_losses(shape):
    found, _ = run(shape, 3)
    assert found.tokens == len(IDS) - 1
    np.testing.assert_allclose(found.per_token, expected(), rtol=0, atol=TOLERANCE)


def test_the_first_batches_are_the_first_tokens():
    found, _ = run({}, 3, num_batches=2, keep=False)
    assert found.per_token is None
    assert found.nll == pytest.approx(expected()[: found.tokens].sum(), rel=1e-6)
    assert 0 < found.tokens < len(IDS) - 1


def test_perplexity_of_what_is_not_finite():
    assert perplexity(1.0) == pytest.approx(np.e)
    assert perplexity(701.0) == np.inf
    assert np.isnan(perplexity(np.nan))


def test_batches_fill_the_mesh_and_no_more():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    assert rows_a_batch(ROWS, mesh, 1) == 4
    assert rows_a_batch(ROWS, mesh, 5) == 8
    assert rows_a_batch(ROWS, mesh, None) == -(-ROWS.num_rows // 4) * 4
