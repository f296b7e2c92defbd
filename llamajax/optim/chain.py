"""AdamW as one optax chain: clip, adam, decay, schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from llamajax.config.schema import OptimConfig
from llamajax.optim.schedule import schedule
from llamajax.sharding import is_weight, map_weights


def decay_mask(tree: Any) -> Any:
    """Tree of bools: decay matrices, not vectors (norm scales)."""
    return map_weights(lambda w: w.replace(len(w.axes) > 1) if is_weight(w) else False, tree)


def build(config: OptimConfig, *, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` updates (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Both moments are corrected for their bias. The second is always float32: in bfloat16 it would
    not change for beta2 above 0.99.
    """
    rate = schedule(config, steps=steps)
    clip = config.clip_norm
    return optax.chain(
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        optax.scale_by_adam(
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            mu_dtype=jnp.dtype(config.moment_dtype),
        ),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(lambda count: rate(count + 1)),
    )


def apply(
    optimizer: optax.GradientTransformation,
    grads: Any,
    opt_state: optax.OptState,
    weights: Any,
    *,
    step: jax.Array | None = None,
) -> tuple[Any, optax.OptState]:
    """Return updated weights and optimizer state.

    step: global batches before this one, which the learning rate follows. Without it, it follows
    the updates, which are fewer where a guard skipped some.
    """
    if step is not None:
        opt_state = _schedule_at(opt_state, step)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes weak types
        updates, opt_state = optimizer.update(grads, opt_state, weights)
        return optax.apply_updates(weights, updates), opt_state


def _schedule_at(opt_state: optax.OptState, step: jax.Array) -> optax.OptState:
    """Set the schedule to `step`; Adam still counts its own updates."""

    def is_schedule(part: Any) -> bool:
        return isinstance(part, optax.ScaleByScheduleState)

    def move(part: Any) -> Any:
        # The state's own count is never ahead. If it were not read at all, it would be no argument
        # of the compiled step, and its memory not reused.
        return part._replace(count=jnp.maximum(part.count, step)) if is_schedule(part) else part

    return jax.tree.map(move, opt_state, is_leaf=is_schedule)
