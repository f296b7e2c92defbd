"""The first state of a run, and the weights that it imports.

A run imports weights once (`train.init_from`). Afterwards its own checkpoints hold everything, but
for the frozen weights of a run with adapters: those are read again from where they were, and must
be the same ones.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from llamajax import data
from llamajax.checkpoint import Checkpoint, check_same_model, named_leaves, restore_state
from llamajax.checkpoint.location import locate
from llamajax.checkpoint.restore import model_differences
from llamajax.config import diff, from_json_dict, to_json_dict
from llamajax.config.schema import RunConfig
from llamajax.errors import UserError, combine
from llamajax.formats.weights import Weights, open_base, open_weights
from llamajax.optim.guard import GuardState
from llamajax.tokenizers.tokenizer_identity import data_mismatch
from llamajax.training.setup import Setup
from llamajax.training.state import StateSpec, TrainState

# What must not change in a run with adapters: the function, or the arrays of its checkpoints.
_FIXED = ("lora.rank", "lora.alpha", "lora.targets", "lora.base_dtype")


def open_initial_weights(
    config: RunConfig, meta: Mapping[str, Any] | None, *, of: str | Path = "this --workdir"
) -> Weights | None:
    """Return the weights to import before the first or next step; None where there are none.

    meta, of: of the checkpoint that the run continues from, if it does, and its run. Raises one
    UserError with everything that does not fit: architecture, tokenizer, the base of earlier
    adapters.
    """
    if meta is not None:
        before = from_json_dict(meta["config"], source="the config of the newest checkpoint")
        changed = diff(before, config) if before.lora.rank or config.lora.rank else {}
        if problems := [
            f"{key}: it was {old}, now it is {new}"
            for key, (old, new) in changed.items()
            if key in _FIXED
        ]:
            raise combine(
                problems,
                title=f"the checkpoints in {of} have other adapters, or none; go back to what it "
                "was, or begin another --workdir with train.init_from and without train.fork:",
            )
        if not config.lora.rank:
            return None
        moved = before.train.init_from != config.train.init_from
        path = locate(config.train.init_from) if moved else None
        return open_base(meta["base"], path=path, adapters=Path(of))
    if config.train.init_from is None:
        return None
    try:
        weights = open_weights(config.train.init_from)
    except UserError as error:
        raise UserError(f"train.init_from = {config.train.init_from}: {error}") from None
    problems = model_differences(*map(dataclasses.asdict, (weights.model, config.model)))
    if config.model.rope_scaling is not None:  # training to a longer context begins like this
        problems = [each for each in problems if not each.startswith("model.rope_scaling")]
    if (tokenizer := weights.tokenizer) is not None:
        path = config.data.paths[0]
        theirs = weights.load_tokenizer()
        ours = data.load_tokenizer(path)
        if problem := data_mismatch(f"data.path: {path}", ours, theirs, tokenizer):
            problems.append(problem)
    if problems:
        raise combine(
            problems, title=f"train.init_from = {config.train.init_from}: its weights do not fit:"
        )
    return weights


def initial_state(setup: Setup, stored: Checkpoint | None, weights: Weights | None) -> TrainState:
    """Return the first state: random, imported, restored, or restored adapters on imported weights.

    stored: the checkpoint to restore, if any. weights: to import. To be called by all processes.
    """
    spec, seed = setup.spec, setup.config.train.seed
    model = None if weights is None else weights.load(spec.abstract_model())
    if stored is not None:
        abstract, keys = _abstract_stored(spec, stored), to_json_dict(setup.config)["model"]
        cast = bool(new_moment_dtypes(abstract, stored))
        saved = restore_state(stored, abstract, model=keys, cast=cast, donated=True)
        saved = spec.with_own_guard(saved)
        state = spec.with_own_average(saved if model is None else saved.replace(model=model))
    elif model is None:
        return spec.init(seed)
    else:
        state = spec.from_weights(model, seed)
    return spec.to_pipeline_order(state)


def check_stored(setup: Setup, stored: Checkpoint) -> None:
    """Raise UserError where a checkpoint is of another model or optimizer than the setup's."""
    abstract, keys = _abstract_stored(setup.spec, stored), to_json_dict(setup.config)["model"]
    cast = bool(new_moment_dtypes(abstract, stored))
    check_same_model(stored, named_leaves(abstract), model=keys, partial=False, cast=cast)


def new_moment_dtypes(abstract: TrainState, stored: Checkpoint) -> list[str]:
    """Return the dtypes that moments of a checkpoint are converted to; none where all fit.

    In older checkpoints with first moments in bfloat16, the second are float32.
    """
    found = stored.arrays
    converted = {
        leaf.dtype.name
        for name, leaf in named_leaves(abstract).items()
        if name.startswith("opt_state/") and name in found and found[name].dtype != leaf.dtype
    }
    return sorted(converted)


def _abstract_stored(spec: StateSpec, stored: Checkpoint) -> TrainState:
    """Return the abstract state that a run saves, with the guard and the average of a checkpoint.

    It may have no guard (of a run without, or older than guards), or one with another window; and
    an average or none, whatever the run has.
    """
    state, found = spec.in_stored_order.abstract().to_save, stored.arrays
    has_average = any(name.startswith("average/") for name in found)
    state = state.replace(average=state.trained if has_average else None)
    names = {field.name: f"guard/{field.name}" for field in dataclasses.fields(GuardState)}
    if not all(name in found for name in names.values()):
        return state.replace(guard=None)
    where = state.step.sharding
    arrays = {
        field: jax.ShapeDtypeStruct(found[name].shape, found[name].dtype, sharding=where)
        for field, name in names.items()
    }
    return state.replace(guard=GuardState(**arrays))
