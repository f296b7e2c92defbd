"""Data that changes at certain steps (`data.stages`), and the position of a run in it.

A stage with the data and the sequence length of the one before goes on in its order: nothing is
repeated or left out. In any other, each source goes on after what was read of it before (in the
number of tokens, where the sequence length changes), and a source that is new begins at its first
sample. So a stage with other weights reads text that is new, as long as the epoch lasts.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llamajax.config import RunConfig, stage_named, stages_of
from llamajax.data.mixture import Mixture, PreparedSplit, open_mixture
from llamajax.data.position import Position, Segment
from llamajax.errors import UserError


def open_stages(config: RunConfig) -> Iterator[Mixture]:
    """Yield the training data of each stage. UserError where it does not fit the run."""
    tokenizer = None
    for number, stage in enumerate(stages_of(config)):
        now = stage.config
        with stage_named(number):
            found = open_mixture(now.data, split="train", vocab_size=now.model.vocab_size)
            tokenizer = tokenizer or found.tokenizer_fingerprint
            if found.tokenizer_fingerprint != tokenizer:
                raise UserError(
                    f"{found.sources[0].path} was prepared with another tokenizer than "
                    f"data.path = {config.data.path}: prepare it with the same one"
                )
        yield found


def with_stages(
    position: Position,
    stages: Iterable[tuple[int, dict[str, Any]]],
    mixtures: Mapping[str, Mixture],
    *,
    step: int,
) -> Position:
    """Return the position of a run that goes on from `step` with these stages.

    position: until `step`, and of a rollback what it planned for later. stages: first step and
    settings (as `Segment.settings`) of each. mixtures: by hash, of all stages.
    """
    stages = list(stages)
    later = [stage for stage in stages if stage[0] >= step]
    planned = {s.first_step: s for s in position.segments if s.first_step > step}
    found = Position(tuple(s for s in position.segments if s.first_step <= step))
    if not later or later[0][0] > step:
        found = found.continued(step=step, **stages[len(stages) - len(later) - 1][1])
    for first_step, settings in later:
        segment = planned.get(first_step)
        if segment is None or segment.settings != settings:
            segment = _segment(found, mixtures, first_step, settings)
        if segment is not None:
            found = Position((*found.segments, segment))
    return found


def _segment(
    before: Position, mixtures: Mapping[str, Mixture], step: int, settings: dict[str, Any]
) -> Segment | None:
    """Return the segment that begins at `step`; None where all stays as it was."""
    last = before.segments[-1]
    if settings == last.settings:
        return None
    if settings | {"batch_size": last.batch_size} == last.settings:
        return before.continued(step=step, **settings).segments[-1]
    sources = mixtures[settings["mixture_hash"]].sources
    reached = [_tokens_reached(before, mixtures, step, source) for source in sources]
    starts = tuple(-(-tokens // settings["seq_len"]) for tokens in reached)
    return Segment(
        first_step=step,
        first_sample=0,
        rounds=last.rounds,
        starts=starts if any(starts) else (),
        **settings,
    )


def _tokens_reached(
    position: Position, mixtures: Mapping[str, Mixture], step: int, source: PreparedSplit
) -> int:
    """Return how far the order of a source was read before `step`, epochs included."""
    end = step
    for segment in reversed(position.segments):
        mixture = mixtures.get(segment.mixture_hash)
        fingerprints = [s.fingerprint for s in mixture.sources] if mixture else []
        if source.fingerprint in fingerprints:
            number = fingerprints.index(source.fingerprint)
            samples = segment.first_sample + (end - segment.first_step) * segment.batch_size
            start = segment.starts[number] if segment.starts else 0
            return (start + mixture.counts(samples)[number]) * segment.seq_len
        end = segment.first_step
    return 0
