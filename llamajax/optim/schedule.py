"""Learning rate of each update: warm-up, then one of four schedules."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from llamajax.config.schema import OptimConfig


def schedule(config: OptimConfig, *, steps: int) -> optax.Schedule:
    """Learning rate of update n as a function of n (1 is the first, `steps` the last).

    Linear from 0 to the peak at n = warmup_steps (so that no update is wasted on a rate of 0), then

    - cosine, linear: down to final_learning_rate at n = steps;
    - wsd: the peak until the last `decay_steps` updates, then linear to final_learning_rate;
    - constant: the peak.
    """
    peak, final, warmup = config.learning_rate, config.final_learning_rate, config.warmup_steps
    rest = max(1, steps - warmup)
    match config.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, alpha=final / peak)
        case "linear":
            after = optax.linear_schedule(peak, final, rest)
        case "wsd":
            decay = config.decay_steps
            after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
        case "constant":
            after = optax.constant_schedule(peak)
    pieces = [optax.linear_schedule(0.0, peak, max(1, warmup)), after]

    def rate(update: Any) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts and floats
            return jnp.asarray(optax.join_schedules(pieces, [warmup])(update), jnp.float32)

    return rate
