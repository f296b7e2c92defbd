"""The stages of a run (`data.stages`): all are compiled at its start, and it goes through them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from llamajax import backends, data
from llamajax.backends.platforms import platform_facts
from llamajax.config import RunConfig, stage_named, stages_of
from llamajax.errors import UserError
from llamajax.training.messages import gib
from llamajax.training.setup import Programs, Setup, compile_programs
from llamajax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class StagePrograms:
    """The programs of a run, by number of the stage; those with the same shapes share them."""

    setup: Setup
    by_number: dict[int, Programs] = dataclasses.field(default_factory=dict)

    def at(self, step: int) -> Programs:
        """Return the programs of the stage that update `step` belongs to."""
        return self.by_number[self.setup.stage_number(step)]

    def facts(self) -> dict[str, Any]:
        """Return what `run.json` says of them where there are several."""
        found = []
        for number, programs in self.by_number.items():
            first_step, stage = self.setup.stages[number]
            fields = {"number": number, "first_step": first_step, "program": programs.digest}
            fields |= {"program_bytes": backends.program_bytes(programs.update)}
            found.append(fields | {"attention": stage.attention.impl})
        return {"stages": found} if len(self.setup.stages) > 1 else {}

    def lacks(self, step: int) -> bool:
        """Return whether those of update `step` are not compiled; then those of later ones are."""
        return self.setup.stage_number(step) not in self.by_number

    def compile(self, state: TrainState, *, step: int) -> list[Programs]:
        """Compile those of update `step` and of all stages after it; return what is new.

        state: of any step. So a stage that does not compile, or that the memory of a device does
        not hold, ends a run at its start.
        """
        new, known = [], {_shapes(self.setup, n): found for n, found in self.by_number.items()}
        for number in range(self.setup.stage_number(step), len(self.setup.stages)):
            if number not in self.by_number:
                shapes = _shapes(self.setup, number)
                if shapes not in known:
                    with stage_named(number):
                        stage = self.setup.stages[number][1]
                        known[shapes] = compile_programs(stage, stage.spec.retyped(state))
                        if number:  # the first finds out by itself, at once
                            _check_memory(stage, known[shapes])
                    new.append(known[shapes])
                self.by_number[number] = known[shapes]
        return new


def _shapes(setup: Setup, number: int) -> tuple:
    stage = setup.stages[number][1]
    c = stage.config
    sizes = (c.data.seq_len, c.data.global_batch_size, c.train.accumulation_steps)
    return *sizes, c.model.rope_scaling, stage.attention.impl


def _check_memory(stage: Setup, programs: Programs) -> None:
    if platform_facts(stage.machine.platform).says_peak:
        return  # XLA for TPUs has refused what does not fit, by its own count
    needed, limit = backends.program_bytes(programs.update), backends.memory_limit_bytes()
    if needed and limit and needed > limit:
        raise UserError(
            f"its step needs {gib(needed)} of a device's memory, which has {gib(limit)}: choose a "
            "smaller data.global_batch_size or data.seq_len, or more train.accumulation_steps "
            "(`llamajax plan` has the parts)"
        )


def check_past(setup: Setup, before: RunConfig, position: "data.Position", *, step: int) -> None:
    """Raise UserError where the stages that have begun are not those of the run so far.

    before, position: the config and the place in the data of the checkpoint of `step`. Where
    neither has come to a second stage, the data may change as in any run.
    """
    was, now = [], []
    stages = stages_of(before)
    for stage, end in zip(stages, [*(s.first_step for s in stages[1:]), step], strict=True):
        if stage.first_step < step:
            settings = position.segment(min(end, step) - 1).settings
            was.append(_words(stage.first_step, settings, stage.config))
    for (first_step, stage), (_, settings) in zip(setup.stages, setup.data_settings, strict=True):
        if first_step < step:
            now.append(_words(first_step, settings, stage.config))
    if max(len(was), len(now)) > 1 and was != now:
        raise UserError(
            f"data.stages: until step {step} this run has read {', '.join(was)}; its config now "
            f"says {', '.join(now)}: what has begun cannot change. Put that back, and add a stage "
            f"with from_step = {step}, or begin another --workdir"
        )


def _words(first_step: int, settings: dict[str, Any], config: RunConfig) -> str:
    """Describe all that must not change of a stage that has begun."""
    size, hash_ = f"{settings['batch_size']} x {settings['seq_len']}", settings["mixture_hash"]
    scaling = config.model.rope_scaling
    scaled = f" with {scaling}" if scaling else ""
    return f"{size} of data {hash_[:8]} from step {first_step} on{scaled}"


def stage_warnings(
    config: RunConfig,
    position: "data.Position",
    mixtures: "Mapping[str, data.Mixture]",
    *,
    step: int,
) -> Iterator[str]:
    """Yield a warning for each stage to come that does not begin where the config says.

    mixtures: by hash, of all stages.
    """
    past = {s.mixture_hash for s in position.segments if s.first_step < step}
    if config.data.stages and not position.reached and past - set(mixtures):
        yield (
            f"warning: until step {step} the run has read data that no stage has now, and its "
            "checkpoint, of an earlier release, does not say of which sources: a stage may read "
            "samples of them again"
        )
    for stage, change in zip(stages_of(config)[1:], config.data.stages, strict=True):
        seen = position.tokens_seen(stage.first_step)
        if change.from_tokens is not None and stage.first_step >= step and seen != stage.tokens:
            yield (
                f"warning: the stage of data.stages with from_tokens = {change.from_tokens} begins "
                f"at step {stage.first_step} with {seen} tokens seen: the run has read other "
                "batches before than this config says. from_step is exact"
            )
