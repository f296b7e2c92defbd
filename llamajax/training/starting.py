"""The state that a run goes on with, and its update; for the run and for whoever repeats it."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from llamajax.checkpoint import Checkpoint, check_same_model, named_leaves, restore_state
from llamajax.config import to_json_dict
from llamajax.formats.weights import Weights
from llamajax.models.abstract import abstract_model
from llamajax.training.feed import Feed
from llamajax.training.safety.canary import Canary, canary_of
from llamajax.training.session import Session
from llamajax.training.state import (
    TrainState,
    abstract_state,
    init_state,
    state_around,
    to_pipeline,
    with_own_guard,
    with_stored_guard,
)
from llamajax.training.step import eval_step, train_step


def starting_state(
    session: Session, stored: Checkpoint | None, origin: Weights | None
) -> TrainState:
    """The state to continue with: random, imported, restored, or adapters on imported weights.

    stored: the checkpoint to restore, if any. origin: weights to import. Call it on all processes.
    """
    config, where = session.config, (session.optimizer, session.mesh)
    lora, layout = config.lora if config.lora.rank else None, session.layout
    model = None
    if origin is not None:
        dtype = jnp.dtype(lora.base_dtype if lora else "float32")
        model = origin.load(abstract_model(config.model, session.mesh, dtype=dtype))
    if stored is not None:
        abstract = _abstract_stored(session, stored)
        saved = restore_state(stored, abstract, model=to_json_dict(config)["model"], donated=True)
        saved = with_own_guard(saved, layout)
        state = saved if model is None else saved.replace(model=model)
    elif model is None:
        return init_state(config.model, *where, seed=config.train.seed, layout=layout)
    else:
        state = state_around(model, *where, lora=lora, seed=config.train.seed, layout=layout)
    return to_pipeline(state, config.model, session.mesh, layout=layout)


def check_stored(session: Session, stored: Checkpoint | None) -> None:
    """Raise UserError where a checkpoint is of another model or optimizer than the session's."""
    if stored is None:
        return
    abstract = named_leaves(_abstract_stored(session, stored))
    check_same_model(stored, abstract, model=to_json_dict(session.config)["model"], partial=False)


def _abstract_stored(session: Session, stored: Checkpoint) -> Any:
    """The state as a session saves it, with the guard's arrays that `stored` has."""
    config, layout = session.config, session.layout.at_rest
    lora, where = config.lora if config.lora.rank else None, (session.optimizer, session.mesh)
    abstract = abstract_state(config.model, *where, lora=lora, layout=layout).to_save
    return with_stored_guard(abstract, stored.arrays)


def update_of(session: Session) -> Callable:
    """The jitted, guarded update of a session, not yet compiled."""
    c = session.config
    where = (session.compute, session.mesh, c.guard)
    return train_step(session.optimizer, c.optim, c.train, *where)


def compile_steps(
    session: Session, feed: Feed, state: TrainState
) -> tuple[Callable, Callable, Canary | None]:
    """Both steps, and the canary: before the first update, so that no signal meets a compiler."""
    config = session.config
    update = update_of(session)
    evaluate = eval_step(session.compute, session.mesh)
    batch, held_out = (
        feed.abstract(n) for n in (config.data.global_batch_size, feed.eval_batch_size)
    )
    lowered = update.lower(state, batch), evaluate.lower(state.whole, held_out)
    return lowered[0].compile(), lowered[1].compile(), canary_of(session, state)
