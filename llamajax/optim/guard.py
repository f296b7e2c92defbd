"""The update guard: which updates are skipped, decided inside the jitted step.

An update is skipped when its loss or gradient norm is not finite, or far above those of the last
applied updates, and when no token of its batch carries loss. Everything here is replicated and a
function of two scalars that are the same on every device, so all devices and processes decide
alike, and nothing waits for the host.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llamajax.config.schema import GuardConfig

# Why an update was skipped, by the number that the step returns.
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
    in_a_row: jax.Array  # skipped since the last that was applied
    loss_W: jax.Array  # float32, a ring: of the last W updates that were applied
    grad_norm_W: jax.Array


@struct.dataclass
class GuardDecision:
    """The decision on one update: an index into REASONS, and where spikes begin (or inf)."""

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
    """Decide whether to apply an update with this loss and gradient norm (float32 scalars)."""
    factor, window = config.spike_factor, state.loss_W.shape[0]
    loss_limit = grad_norm_limit = jnp.float32(jnp.inf)
    if factor is not None:
        full = state.applied >= window
        loss_limit = jnp.where(full, _limit(state.loss_W, factor), jnp.inf)
        grad_norm_limit = jnp.where(full, _limit(state.grad_norm_W, factor), jnp.inf)
    checked = jnp.bool_(config.nonfinite != "off")
    reasons = {  # the first that holds counts
        5: jnp.isnan(loss) & (grad_norm == 0),  # nothing to average
        1: checked & ~jnp.isfinite(loss),
        2: checked & ~jnp.isfinite(grad_norm),
        3: loss > loss_limit,
        4: grad_norm > grad_norm_limit,
    }
    reason = jnp.select([*reasons.values()], [jnp.int32(n) for n in reasons], jnp.int32(0))
    return GuardDecision(reason=reason, loss_limit=loss_limit, grad_norm_limit=grad_norm_limit)


def advance(
    state: GuardState, decision: GuardDecision, *, loss: jax.Array, grad_norm: jax.Array
) -> GuardState:
    """The state after an update; values of a skipped one never enter the medians."""
    applied, window = decision.reason == 0, state.loss_W.shape[0]
    slot_W = jnp.arange(window, dtype=jnp.int32)
    here_W = (slot_W == state.applied % window) & applied
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
    """`factor` deviations above the median; both are robust to half of the values."""
    middle = values_W.shape[0] // 2
    median = jnp.sort(values_W)[middle]
    deviation = _DEVIATIONS * jnp.sort(jnp.abs(values_W - median))[middle]
    return median + factor * jnp.maximum(deviation, _LEAST_DEVIATION * jnp.abs(median))
