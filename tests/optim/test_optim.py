"""Learning rates by hand, the decay mask, and the first update of AdamW."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import tiny_optim

from llamajax import optim
from llamajax.config.schema import OptimConfig

RATES = {"learning_rate": 1e-2, "final_learning_rate": 1e-3}
CONFIG = tiny_optim(
    **RATES, warmup_steps=10, schedule="cosine", decay_steps=20, weight_decay=0.0, clip_norm=None
)
STEPS = 110
# The rate at the updates 60 and 100: midway through cosine and linear, and in wsd's decay.
LATER = {
    "cosine": (5.5e-3, 1e-3 + 4.5e-3 * (1 + np.cos(0.9 * np.pi)), 1e-3),
    "linear": (5.5e-3, 1.9e-3, 1e-3),
    "wsd": (1e-2, 5.5e-3, 1e-3),
    "constant": (1e-2, 1e-2, 1e-2),
}


def tree(scale: float = 1.0) -> dict[str, nnx.Param]:
    """A matrix, a stack of matrices, a vector and a stack of vectors."""
    shapes = {"DF": (3, 4), "FD": (2, 4, 3), "D": (3,)}
    weights = {
        f"w{axes}": nnx.Param(jnp.full(shape, scale, jnp.float32), axes=axes)
        for axes, shape in shapes.items()
    }
    return weights | {"stacked": nnx.Param(jnp.full((2, 3), scale, jnp.float32), axes="D")}


def updated(config: OptimConfig, weights, grads, *, updates: int = 1):
    optimizer = optim.build(config, steps=STEPS)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(weights)
    for _ in range(updates):
        weights, state = optim.apply(optimizer, grads, state, weights)
    return weights, state


@pytest.mark.parametrize("shape", LATER)
def test_the_schedule_at_its_landmarks(shape):
    rate = optim.schedule(dataclasses.replace(CONFIG, schedule=shape), steps=STEPS)
    found = [float(rate(n)) for n in (0, 1, 5, 10, 60, 100, STEPS)]
    np.testing.assert_allclose(found, [0.0, 1e-3, 5e-3, 1e-2, *LATER[shape]], rtol=1e-5)


@pytest.mark.parametrize("shape", LATER)
def test_without_warm_up_the_first_update_has_nearly_the_peak(shape):
    config = dataclasses.replace(CONFIG, schedule=shape, warmup_steps=0)
    assert float(optim.schedule(config, steps=STEPS)(1)) == pytest.approx(1e-2, rel=0.01)


def test_wsd_holds_the_peak_until_its_decay():
    rate = optim.schedule(dataclasses.replace(CONFIG, schedule="wsd"), steps=STEPS)
    assert float(rate(STEPS - 20)) == pytest.approx(1e-2)
    assert float(rate(STEPS - 19)) == pytest.approx(1e-2 - 9e-3 / 20)


def test_the_schedule_is_float32_of_a_traced_count():
    rate = jax.jit(optim.schedule(CONFIG, steps=STEPS))(jnp.int32(10))
    assert rate.dtype == jnp.float32
    assert float(rate) == pytest.approx(1e-2)


def test_decay_shrinks_matrices_alone_by_the_rate_of_the_update():
    config = dataclasses.replace(CONFIG, weight_decay=0.5)
    weights, _ = updated(config, tree(2.0), tree(0.0))
    for name, weight in weights.items():
        expected = 2.0 if name in ("wD", "stacked") else 2.0 * (1 - 1e-3 * 0.5)
        np.testing.assert_allclose(weight.get_value(), expected, rtol=1e-6)


@pytest.mark.parametrize("grad", [1e-3, -7.0])
def test_the_first_update_is_the_rate_because_both_moments_are_corrected(grad):
    weights, _ = updated(CONFIG, tree(0.0), tree(grad))
    for weight in weights.values():
        np.testing.assert_allclose(weight.get_value(), -np.sign(grad) * 1e-3, rtol=1e-4)


def test_updates_equal_adam_in_float64():
    config = dataclasses.replace(CONFIG, epsilon=1e-2, clip_norm=None)
    weights, _ = updated(config, tree(1.0), tree(0.3), updates=5)
    expected, m, v = 1.0, 0.0, 0.0
    for n in range(1, 6):
        m, v = 0.9 * m + 0.1 * 0.3, 0.95 * v + 0.05 * 0.3**2
        expected -= 1e-3 * n * (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.95**n)) + 1e-2)
    np.testing.assert_allclose(weights["wDF"].get_value(), expected, rtol=1e-6)


def test_clipping_is_by_the_norm_of_all_gradients():
    values = sum(w.get_value().size for w in tree().values())
    limit = 0.5 * np.sqrt(values)  # half the norm of a gradient of ones
    config = dataclasses.replace(CONFIG, clip_norm=float(limit), epsilon=1.0)
    weights, _ = updated(config, tree(0.0), tree(1.0))
    for weight in weights.values():
        np.testing.assert_allclose(weight.get_value(), -1e-3 * 0.5 / (0.5 + 1.0), rtol=1e-5)


def test_the_second_moment_stays_float32():
    _, state = updated(dataclasses.replace(CONFIG, moment_dtype="bfloat16"), tree(), tree())
    adam = next(s for s in state if hasattr(s, "mu"))
    assert {x.dtype for x in jax.tree.leaves(adam.mu)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(adam.nu)} == {jnp.dtype(jnp.float32)}
