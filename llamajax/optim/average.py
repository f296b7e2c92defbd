"""An exponential moving average of the weights, which does not change training."""

from typing import Any

import jax
import jax.numpy as jnp

from llamajax.optim.guard import select_update


@jax.jit
def copied(weights: Any) -> Any:
    """Return a copy of the weights in their shards: an average before its first update."""
    return jax.tree.map(jnp.copy, weights)


def move_average(
    average: Any, weights: Any, *, decay: float | None, step: jax.Array, applied: jax.Array | None
) -> Any:
    """Return the average after the update of `weights` at `step`; unchanged if it is not `applied`.

    No-op where there is no average. The decay is smaller in the first steps, (1 + step) /
    (10 + step), so that the random first weights are soon forgotten (as in TensorFlow's
    ExponentialMovingAverage).
    """
    if average is None:
        return None
    # Without a barrier XLA might fuse the update with this, and round the weights otherwise.
    weights = jax.lax.optimization_barrier(weights)
    n = step.astype(jnp.float32)
    part = 1 - jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n))
    moved = jax.tree.map(lambda a, w: a + part * (w - a), average, weights)
    return moved if applied is None else select_update(applied, moved, average)
