"""Where in the data a run continues, and whether its stages are still those that it had."""

from collections.abc import Iterator, Mapping
from typing import Any

from llamajax import data
from llamajax.config import RunConfig, from_json_dict, stages_of
from llamajax.errors import UserError
from llamajax.training.safety.rollback_log import RollbackLog
from llamajax.training.setup import Setup
from llamajax.training.workdir import Run


def place_in_data(
    run: Run, meta: Mapping[str, Any] | None, step: int, *, origin: Mapping[str, Any] | None
) -> tuple[data.Position, data.Ledger]:
    """Return where in the data a run continues, and what it has read.

    meta, step: of the checkpoint that it continues from, if it does. origin: what is recorded of
    that where it is another run's.
    """
    mixtures, saved = run.setup.mixtures, (meta or {}).get("ledger")
    if meta is not None:
        before = _saved_position(meta, step)
        if origin is None:
            check_past(run.setup, from_json_dict(meta["config"]), before, step=step)
        if saved and step:
            data.check_ledger(saved, mixtures, before, step=step)
    position = read_position(run.setup, meta, run.rollbacks, step=step, is_fork=origin is not None)
    for line in stage_warnings(run.config, position, mixtures, step=step):
        run.say(line)
    return position, data.Ledger(mixtures, position, step=step, saved=saved)


def _saved_position(meta: Mapping[str, Any], step: int) -> data.Position:
    return data.Position.from_json(meta["position"], reached=meta.get("reached")).until(step)


def read_position(
    setup: Setup, meta: Mapping[str, Any] | None, log: RollbackLog, *, step: int, is_fork: bool
) -> data.Position:
    """Return where in the data a run goes on from `step`, after what rollbacks have left out.

    meta: of the checkpoint before that, if there is one. is_fork: whether it is another run's,
    whose rollbacks are not those of `log`.
    """
    before, packing = meta and _saved_position(meta, step), setup.config.data.packing
    stages = data.with_packing(setup.data_settings, setup.mixtures, packing, before)
    before = before or data.Position.start(**stages[0][1])
    count = 0 if meta is None or is_fork else meta.get("rollbacks", 0)
    position = log.position(before, step=step, rollbacks=count)
    return data.with_stages(position, stages, setup.mixtures, step=step)


def check_past(setup: Setup, before: RunConfig, position: data.Position, *, step: int) -> None:
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
    position: data.Position,
    mixtures: Mapping[str, data.Mixture],
    *,
    step: int,
) -> Iterator[str]:
    """Yield a warning for each stage to come that does not begin where the config says.

    mixtures: by hash, of all stages.
    """
    segments = [s for s in position.segments if s.first_step < step]
    is_closed = bool({s.mixture_hash for s in segments} - set(mixtures))
    has_examples = any(mixture.masked for mixture in mixtures.values())
    is_unknown = is_closed and not data.packings_read(segments, mixtures)
    if config.data.packing == "auto" and has_examples and is_unknown:
        yield (
            f"warning: until step {step} the run has read data that its config does not have now, "
            "text or windows of instructions: instructions are packed by whole examples from here "
            "on. data.packing=windows cuts them into windows"
        )
    if not position.reached and is_closed:
        yield (
            f"warning: until step {step} the run has read data that its config does not have now, "
            "and its checkpoint, of an earlier release, does not say of which sources: samples of "
            "them may be read again"
        )
    for stage, change in zip(stages_of(config)[1:], config.data.stages, strict=True):
        seen = position.tokens_seen(stage.first_step)
        if change.from_tokens is not None and stage.first_step >= step and seen != stage.tokens:
            yield (
                f"warning: the stage of data.stages with from_tokens = {change.from_tokens} begins "
                f"at step {stage.first_step} with {seen} tokens seen: the run has read other "
                "batches before than this config says. from_step is exact"
            )
