"""Sampling against NumPy in float64, and what its random bits depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax.decoding.generate_options import Sampling
from llamajax.decoding.sampling import keep_top, penalize, sample, scale


def numpy_probabilities(logits, *, temperature, top_k=None, top_p=None):
    """What tokens of one row are drawn with, by sorting."""
    x = logits.astype(np.float64) / temperature
    order = np.argsort(-x, kind="stable")
    p = np.exp(x[order] - x.max())
    if top_k is not None:
        p[top_k:] = 0
    p /= p.sum()
    if top_p is not None:
        p[np.cumsum(p) - p >= top_p] = 0
    found = np.zeros_like(p)
    found[order] = p / p.sum()
    return found


@pytest.mark.parametrize(
    "flags",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.5},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 1.0, "top_k": 1000},
    ],
    ids=str,
)
def test_the_tokens_left_and_their_probabilities_equal_numpy(flags):
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 2
    expected = np.stack([numpy_probabilities(row, **flags) for row in logits])
    got = keep_top(scale(jnp.asarray(logits), flags["temperature"]), Sampling(**flags))
    np.testing.assert_allclose(jax.nn.softmax(got, axis=1), expected, rtol=1e-4, atol=1e-7)
    assert np.array_equal(np.isfinite(got), expected > 0)


def test_the_penalty_makes_seen_tokens_less_probable_for_either_sign():
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0, 0.0]])
    seen = jnp.array([[True, True, False, False, True]])
    assert penalize(logits, seen, 4.0).tolist() == [[0.5, -8.0, 2.0, -2.0, 0.0]]


def draw(logits, *, seed=0, numbers=(0,), index=0, seen=None, **flags):
    return sample(
        jnp.asarray(logits, jnp.float32),
        Sampling(**flags),
        seed=jnp.uint32(seed),
        numbers_B=jnp.array(numbers, jnp.int32),
        index=jnp.int32(index),
        seen_BV=seen,
    ).tolist()


def test_greedy_takes_the_lowest_of_equals_and_heeds_the_penalty():
    logits = [[0.0, 3.0, 1.0, 3.0], [5.0, 5.0, 5.0, 5.0]]
    assert draw(logits, numbers=(0, 1), temperature=0.0) == [1, 0]
    seen = jnp.array([[False, True, False, False], [True, True, True, False]])
    flags = {"temperature": 0.0, "repetition_penalty": 2.0}
    assert draw(logits, numbers=(0, 1), seen=seen, **flags) == [3, 3]


def test_tokens_are_drawn_as_often_as_they_are_probable():
    p, count = np.array([0.5, 0.3, 0.15, 0.05]), 20_000
    logits = np.tile(np.log(p), (count, 1))
    tokens = draw(logits, numbers=range(count), temperature=1.0)
    found = np.bincount(tokens, minlength=4)
    chi2 = ((found - p * count) ** 2 / (p * count)).sum()
    assert chi2 < 16.3, "three degrees of freedom, one in a thousand"
    for other in ({"seed": 1}, {"index": 1}):
        assert draw(logits, numbers=range(count), temperature=1.0, **other) != tokens


def test_a_tiny_temperature_is_greedy_and_not_nan():
    logits = np.random.default_rng(2).normal(size=(8, 30)) * 100
    greedy = draw(logits, numbers=range(8), temperature=0.0)
    assert draw(logits, numbers=range(8), temperature=1e-6, top_p=0.9) == greedy
