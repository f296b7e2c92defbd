"""The guard's decisions, and what it remembers of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax.config.schema import GuardConfig
from llamajax.optim.guard import REASONS, advance, decide, new_guard, select_update

WINDOW = 8


def seen(values, config, *, state=None):
    """Reasons and final state of updates with these losses, and gradient norms of twice that."""
    state, reasons = new_guard(WINDOW) if state is None else state, []
    for value in values:
        numbers = {"loss": jnp.float32(value), "grad_norm": jnp.float32(2 * value)}
        decision = decide(state, **numbers, config=config)
        state = advance(state, decision, **numbers)
        reasons.append(REASONS[int(decision.reason)])
    return reasons, state


def test_what_is_not_finite_is_skipped_and_not_remembered():
    reasons, state = seen([1.0, np.nan, np.inf, 2.0, np.nan], GuardConfig())
    odd = "the loss is not finite"
    assert reasons == ["applied", odd, odd, "applied", odd]
    assert (int(state.applied), int(state.skipped), int(state.in_a_row)) == (2, 3, 1)
    np.testing.assert_array_equal(state.loss_W, [1, 2, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(state.grad_norm_W, [2, 4, 0, 0, 0, 0, 0, 0])


def reason(loss, grad_norm, config, *, state=None) -> str:
    """Reason of one decision."""
    numbers = {"loss": jnp.float32(loss), "grad_norm": jnp.float32(grad_norm)}
    return REASONS[int(decide(state or new_guard(WINDOW), **numbers, config=config).reason)]


@pytest.mark.parametrize(
    ("loss", "grad_norm", "nonfinite", "expected"),
    [
        (1, np.inf, "skip", "the gradient is not finite"),
        (np.nan, 0, "skip", "no token of the batch carries loss"),
        (np.nan, 0, "stop", "no token of the batch carries loss"),
        (np.nan, 0, "off", "no token of the batch carries loss"),
        (np.nan, np.nan, "off", "applied"),
    ],
)
def test_what_is_not_finite_is_named(loss, grad_norm, nonfinite, expected):
    assert reason(loss, grad_norm, GuardConfig(nonfinite=nonfinite)) == expected


def test_a_spike_is_judged_by_median_and_deviation_once_the_window_is_full():
    rng = np.random.default_rng(0)
    noise = rng.normal(5.0, 0.2, WINDOW)
    config = GuardConfig(spike_factor=6.0)
    median = np.sort(noise)[WINDOW // 2]
    deviation = 1.4826 * np.sort(np.abs(noise - median))[WINDOW // 2]
    limit = median + 6.0 * deviation
    assert set(seen([*noise[:-1], 100.0], config)[0]) == {"applied"}, "judged too early"
    below, _ = seen([*noise, limit - 0.01], config)
    above, state = seen([*noise, limit + 0.01], config)
    assert below[-1] == "applied"
    assert above[-1] == "the loss spikes"
    assert float(np.max(state.loss_W)) < limit, "a spike entered the median"
    assert seen([limit + 0.01] * 20, config, state=state)[0] == ["the loss spikes"] * 20


def test_the_norm_alone_spikes_and_equal_values_leave_room_for_noise():
    config = GuardConfig(spike_factor=5.0)
    _, state = seen([1.0] * WINDOW, config)
    assert reason(1, 2.09, config, state=state) == "applied"
    assert reason(1, 2.11, config, state=state) == "the gradient norm spikes"


@pytest.mark.parametrize("applied", [True, False])
def test_the_selected_update_is_the_old_bit_for_bit_or_the_new(applied):
    old = {"a": jnp.array([1.0, -0.0, np.nan]), "b": jnp.arange(3)}
    new = {"a": jnp.array([2.0, np.nan, 3.0]), "b": jnp.arange(3) + 1}
    found = jax.jit(select_update)(jnp.bool_(applied), new, old)
    wanted = new if applied else old
    for name in wanted:
        assert np.asarray(found[name]).tobytes() == np.asarray(wanted[name]).tobytes()
