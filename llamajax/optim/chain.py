"""The optimizer of a run as one optax chain: clip, AdamW or Muon, decay, schedule."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llamajax.config.schema import OptimConfig
from llamajax.optim.custom import custom_chain
from llamajax.optim.moments import with_bfloat16_moments
from llamajax.optim.muon import is_muon_matrix, scale_by_muon
from llamajax.optim.schedule import schedule
from llamajax.sharding import is_weight, map_weights


def decay_mask(tree: Any) -> Any:
    """Tree of bools: decay matrices, not vectors (norm scales)."""
    return map_weights(lambda w: w.replace(len(w.axes) > 1) if is_weight(w) else False, tree)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts of a run for its optimizer. layers: the number of each stored layer; None: in order.

    dtype: of Muon's products.
    """

    seed: int = 0
    dtype: str = "float32"
    layers: np.ndarray | None = None


def build(
    config: OptimConfig, *, steps: int, facts: RunFacts | None = None
) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` updates (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Both moments are corrected for their bias. Moments in bfloat16 are rounded stochastically: to
    the nearest, the second would not change for beta2 above 0.99.
    """
    facts = facts or RunFacts()
    rate = schedule(config, steps=steps)
    if config.chain is not None:
        optimizer = custom_chain(config, lambda count: rate(count + 1))
    else:
        clip = config.clip_norm
        optimizer = optax.chain(
            optax.identity() if clip is None else optax.clip_by_global_norm(clip),
            _direction(config, facts),
            optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(lambda count: rate(count + 1)),
            *_own_rate(config),  # last: the others' names in a checkpoint stay as they are
        )
    if config.moment_dtype == "bfloat16":
        return with_bfloat16_moments(optimizer, facts.seed, facts.layers)
    return optax.with_extra_args_support(optimizer)


def _direction(config: OptimConfig, facts: RunFacts) -> optax.GradientTransformation:
    """Return the transformation of gradients to updates, before decay and learning rate."""
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
    if config.name == "adamw":
        return adam
    muon = scale_by_muon(config.muon_beta, dtype=facts.dtype)
    return optax.partition({"muon": muon, "adamw": adam}, _labels)


def _labels(tree: Any) -> Any:
    """Tree of names: which optimizer updates a weight."""
    return map_weights(lambda w: w.replace("muon" if is_muon_matrix(w) else "adamw"), tree)


def _own_rate(config: OptimConfig) -> list[optax.GradientTransformation]:
    """Return the transformation for a learning rate of Muon's own, if one is set."""
    if config.name != "muon" or config.muon_learning_rate is None:
        return []
    ratio = config.muon_learning_rate / config.learning_rate

    def scaled(update: Any) -> Any:
        return update.replace(update.get_value() * ratio) if is_muon_matrix(update) else update

    return [optax.stateless(lambda updates, weights: map_weights(scaled, updates))]


def apply(
    optimizer: optax.GradientTransformation,
    grads: Any,
    opt_state: optax.OptState,
    weights: Any,
    *,
    step: jax.Array | None = None,
) -> tuple[Any, optax.OptState]:
    """Return updated weights and optimizer state.

    step: global batches before this one, which the learning rate and the random bits of rounded
    moments follow. Without it, the rate follows the updates, which are fewer where a guard skipped
    some, and every update rounds alike.
    """
    if step is not None:
        opt_state = _schedule_at(opt_state, step)
    at = jnp.int32(0) if step is None else step
    with jax.numpy_dtype_promotion("standard"):  # optax mixes weak types
        updates, opt_state = optimizer.update(grads, opt_state, weights, step=at)
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
