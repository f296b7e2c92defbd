"""The stages of a run (`data.stages`): each is a whole config with a first step."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from llamajax.config.check import check
from llamajax.config.data_schema import DataStage
from llamajax.config.keys import leaves
from llamajax.config.schema import RunConfig
from llamajax.errors import UserError

# What a stage may change, and the section of each key.
_SECTIONS = dict.fromkeys(("path", "weights", "seq_len", "global_batch_size"), "data")
_SECTIONS |= {"accumulation_steps": "train", "rope_scaling": "model"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """The steps from `first_step` on: that many updates, and `tokens` tokens, are before it.

    config: of the run, with the changes of all stages so far; it has no `data.stages` itself.
    tokens: as this config says, from step 0 on.
    """

    first_step: int
    tokens: int
    config: RunConfig


def stages_of(run: RunConfig) -> tuple[Stage, ...]:
    """Return the stages of a run; the first begins at step 0."""
    plain = dataclasses.replace(run, data=dataclasses.replace(run.data, stages=()))
    found = [Stage(first_step=0, tokens=0, config=plain)]
    for change in run.data.stages:
        last = found[-1]
        each = last.config.data.global_batch_size * last.config.data.seq_len
        first_step = change.from_step
        if first_step is None:
            first_step = last.first_step - (last.tokens - change.from_tokens) // each
        tokens = last.tokens + (first_step - last.first_step) * each
        changed = _changed(last.config, change)
        found.append(Stage(first_step=first_step, tokens=tokens, config=changed))
    return tuple(found)


def config_of_step(run: RunConfig, step: int) -> RunConfig:
    """Return the config of the stage that update `step` belongs to."""
    return [s for s in stages_of(run) if s.first_step < max(step, 1)][-1].config


@contextlib.contextmanager
def stage_named(number: int) -> Iterator[None]:
    """Name the stage in a UserError of the block; no-op for the first one, number 0."""
    try:
        yield
    except UserError as error:
        if number == 0:
            raise
        raise UserError(f"data.stages[{number - 1}]: {error}") from None


def _changed(config: RunConfig, change: DataStage) -> RunConfig:
    for name, section in _SECTIONS.items():
        value = getattr(change, name)
        if value is not None or (name == "weights" and change.path is not None):
            part = dataclasses.replace(getattr(config, section), **{name: value})
            config = dataclasses.replace(config, **{section: part})
    return config


def stage_problems(run: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the stages of a run that is right without them."""
    for number, change in enumerate(run.data.stages):
        title = f"data.stages[{number}]"
        if (change.from_step is None) == (change.from_tokens is None):
            yield f"{title}: set one of from_step and from_tokens, which say where it begins"
            return
        if all(getattr(change, name) is None for name in _SECTIONS):
            yield f"{title}: changes nothing; set one of {', '.join(_SECTIONS)}"
    stages = stages_of(run)
    for number, (before, stage) in enumerate(itertools.pairwise(stages)):
        title, first = f"data.stages[{number}]", stage.first_step
        if first <= before.first_step:
            yield (
                f"{title}: begins at step {first}, and the stage before it at step "
                f"{before.first_step}: list stages by rising steps"
            )
        elif first >= run.train.steps:
            yield (
                f"{title}: begins at step {first}, where train.steps = {run.train.steps} leaves it "
                "no update; raise train.steps, or leave the stage out"
            )
        known = check(_values(before.config))
        new = [problem for problem in check(_values(stage.config)) if problem not in known]
        yield from (f"{title}, from step {first} on: {problem}" for problem in new)


def _values(run: RunConfig) -> dict[str, Any]:
    """Return every value by path, without the keys of a section that is none."""
    found = leaves(run)
    return {p: value for p, value in found.items() if found.get(p.rpartition(".")[0], run)}
