"""Which updates are left out, decided inside the jitted step; pure functions over arrays.

An update is left out when its loss or gradient norm is not finite, or lies far above those of the
last updates that were applied, and when no token of its batch carries loss. Everything here is
replicated and a function of two scalars that are the same on every device, so all devices and
processes decide alike, and nothing waits for the host.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llamajax.config.schema import GuardConfig

# Why an update was left out, by the number that the step returns.
REASONS = (
    "applied",
    "the loss is not finite",
    "the gradient is not finite",
    "the loss spikes",
    "the gradient norm spikes",
    "no token of the batch carries loss",
)
# A normal distribution's standard deviation is so many times its median absolute deviation.
_DEVIATIONS = 1.4826
# Where values hardly differ (a tiny data set, read again and again) noise is no spike.
_LEAST_DEVIATION = 0.01


@struct.dataclass
class GuardState:
    """What the guard remembers; part of the TrainState, replicated. Letter W: the window."""

    applied: jax.Array  # int32 scalars: updates since the run began
    skipped: jax.Array
    in_a_row: jax.Array  # left out since the last that was applied
    loss_W: jax.Array  # float32, a ring: of the last W updates that were applied
    grad_norm_W: jax.Array


@struct.dataclass
class GuardDecision:
    """What is decided of one update: an index into REASONS, and where spikes begin (or inf)."""

    reason: jax.Array
    loss_limit: jax.Array
    grad_norm_limit: jax.Array


def new_guard(window: int) -> GuardState:
    """The state of a guard that has seen nothing."""
    zero, none = jnp.int32(0), jnp.zeros(window, jnp.float32)
    return GuardState(applied=zero, skipped=zero, in_a_row=zero, loss_W=none, grad_norm_W=none)


def decide(
    state: GuardState, *, loss: jax.Array, grad_norm: jax.Array, config: GuardConfig
) -> GuardDecision:
    """Whether an update with this loss and gradient norm (float32 scalars) is to be applied."""
    factor, window = config.spike_factor, state.loss_W.shape[0]
    limits = [jnp.float32(jnp.inf)] * 2
    if factor is not None:
        full = state.applied >= window
        rings = (state.loss_W, state.grad_norm_W)
        limits = [jnp.where(full, _limit(ring, factor), jnp.inf) for ring in rings]
    # The first that holds counts.
    signs = [
        ~jnp.isfinite(loss),
        ~jnp.isfinite(grad_norm),
        loss > limits[0],
        grad_norm > limits[1],
    ]
    if config.nonfinite == "off":
        signs[:2] = [jnp.bool_(False)] * 2
    signs.insert(0, jnp.isnan(loss) & (grad_norm == 0))  # nothing to average
    reason = jnp.select(signs, [jnp.int32(n) for n in (5, 1, 2, 3, 4)], jnp.int32(0))
    return GuardDecision(reason=reason, loss_limit=limits[0], grad_norm_limit=limits[1])


def advance(
    state: GuardState, verdict: GuardDecision, *, loss: jax.Array, grad_norm: jax.Array
) -> GuardState:
    """The state after an update; values of one that was left out never enter the medians."""
    applied = verdict.reason == 0
    place_W = jnp.arange(state.loss_W.shape[0], dtype=jnp.int32)
    here_W = (place_W == state.applied % state.loss_W.shape[0]) & applied
    skipped = jnp.int32(~applied)
    return GuardState(
        applied=state.applied + 1 - skipped,
        skipped=state.skipped + skipped,
        in_a_row=jnp.where(applied, 0, state.in_a_row + 1),
        loss_W=jnp.where(here_W, loss, state.loss_W),
        grad_norm_W=jnp.where(here_W, grad_norm, state.grad_norm_W),
    )


def select_update(applied: jax.Array, new: Any, old: Any) -> Any:
    """`new` where the update is applied, else `old` bit for bit: trees of the same arrays."""
    return jax.tree.map(lambda n, o: jax.lax.select(applied, n, o), new, old)


def _limit(values_W: jax.Array, factor: float) -> jax.Array:
    """So many deviations above the median; both of them robust to half of the values."""
    middle = values_W.shape[0] // 2
    median = jnp.sort(values_W)[middle]
    deviation = _DEVIATIONS * jnp.sort(jnp.abs(values_W - median))[middle]
    return median + factor * jnp.maximum(deviation, _LEAST_DEVIATION * jnp.abs(median))
