"""The loss of each token on any mesh, in any batch size, against plain logits."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from meshes import mesh_of
from tiny_model import COMPUTE, tiny_model

from llamajax import sharding
from llamajax.evaluation.scoring import perplexity, rows_a_batch, score, token_scores
from llamajax.evaluation.windows import sliding_window, window_rows
from llamajax.models.llama import Llama

CONFIG = tiny_model(vocab_size=131, rope_theta=12_345.0, norm_eps=1e-4, init_std=0.4)
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 61).astype(np.int32)
WINDOWS = sliding_window(len(IDS), 13, 5)
ROWS = window_rows(IDS, WINDOWS)
TOLERANCE = 1e-5  # nats, of losses of several nats: float32, sums in another order


@functools.cache
def model() -> Llama:
    return Llama(CONFIG, jax.random.key(0))


def losses_alone(ids: np.ndarray, num_targets: int) -> np.ndarray:
    """The losses of the last tokens of a row of its own, from the logits in float64."""
    tokens = np.zeros((1, 24), np.int32)
    tokens[0, : len(ids) - 1] = ids[:-1]
    batch = {"tokens": tokens, "positions": np.arange(24, dtype=np.int32)[None]}
    scores = np.asarray(logits()(model(), batch), np.float64)[0, : len(ids) - 1]
    chosen = scores[np.arange(len(scores)), ids[1:]]
    return (np.log(np.exp(scores).sum(axis=1)) - chosen)[-num_targets:]


@functools.cache
def logits():
    return jax.jit(lambda weights, batch: weights.logits(batch, COMPUTE))


@functools.cache
def expected() -> np.ndarray:
    """Loss of each scored token."""
    found = [losses_alone(IDS[begin:end], end - first) for begin, first, end in WINDOWS]
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


@pytest.mark.parametrize(
    ("shape", "batch_size"),
    [
        *(({}, size) for size in (1, 3, 7, 100)),
        ({"data": 2}, 3),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 3),
        ({"sequence": 2, "tensor": 2}, 3),
        ({"stage": 2, "fsdp": 2, "sequence": 2}, 3),
    ],
    ids=str,
)
def test_neither_batch_nor_mesh_changes_a_loss(shape, batch_size):
    assert ROWS.num_rows == 11, "so that 3, 7 and 100 end in padding"
    found, shown = run(shape, batch_size)
    assert (found.num_rows, found.tokens) == (11, len(IDS) - 1)
    np.testing.assert_allclose(found.per_token, expected(), rtol=0, atol=TOLERANCE)
    assert found.nll == pytest.approx(expected().sum(), rel=1e-6)
    assert shown[-1]["loss"] == found.nll / found.tokens


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
