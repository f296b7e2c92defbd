"""Data that changes at certain steps, by `data.stages` or by hand, and the position of a run in it.

With the data and the sequence length of before, whatever the batch size, a run goes on in its
order: nothing is repeated or left out. Otherwise each source goes on after what was read of it
before, and a source that is new begins at its first sample. So a stage with other weights reads
text that is new, as long as the epoch lasts.

With another sequence length a source goes on after as many tokens, in another order: another cut.
Unshuffled, nothing is repeated and less than one sample is left out. Shuffled, the number of epochs
is kept; the rest of the epoch is a new draw and may repeat text of it, which no cut of the unread
pieces into longer samples could avoid.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llamajax.config import RunConfig, stage_named, stages_of
from llamajax.data.mixture import Mixture, open_mixture
from llamajax.data.packing import EXAMPLES, WINDOWS
from llamajax.data.position import Position, Segment
from llamajax.errors import UserError


def open_stages(config: RunConfig) -> Iterator[Mixture]:
    """Yield the training data of each stage. UserError where it does not fit the run."""
    first, has_examples = None, False
    for number, stage in enumerate(stages_of(config)):
        now = stage.config
        with stage_named(number):
            found = open_mixture(now.data, split="train", vocab_size=now.model.vocab_size)
            first = first or found.sources[0]
            if problem := found.sources[0].tokenizer_problem(first):
                raise UserError(problem)
        has_examples |= found.masked
        yield found
    if config.data.packing == EXAMPLES and not has_examples:
        raise UserError(
            f"data.packing = examples is for instructions, and data.path = {config.data.path} has "
            "none: text is always cut into windows. Leave it at auto, or prepare the data with "
            "--format=instructions"
        )


def with_packing(
    stages: Iterable[tuple[int, dict[str, Any]]],
    mixtures: Mapping[str, Mixture],
    setting: str,
    before: Position | None,
) -> list[tuple[int, dict[str, Any]]]:
    """Return the stages with the `Segment.packing` of each; of text always windows.

    setting: `data.packing`. before: what the run has read so far, None for nothing.
    """
    if setting == "auto":
        found = packings_read(before.segments if before else (), mixtures)
        setting = found[-1] if found else EXAMPLES
    return [
        (step, each | {"packing": setting if mixtures[each["mixture_hash"]].masked else WINDOWS})
        for step, each in stages
    ]


def packings_read(segments: Iterable[Segment], mixtures: Mapping[str, Mixture]) -> list[str]:
    """Return the packing of each of the segments that is known to be of instructions."""
    masked = {key for key, mixture in mixtures.items() if mixture.masked}
    return [s.packing for s in segments if s.packing == EXAMPLES or s.mixture_hash in masked]


def with_stages(
    position: Position,
    stages: Iterable[tuple[int, dict[str, Any]]],
    mixtures: Mapping[str, Mixture],
    *,
    step: int,
) -> Position:
    """Return the position of a run that goes on from `step` with these stages.

    position: until `step`; what it has for later is planned anew. stages: first step and settings
    (as `Segment.settings`) of each. mixtures: by hash, of all stages.
    """
    stages = list(stages)
    later = [stage for stage in stages if stage[0] > step]
    _, current = stages[-len(later) - 1]
    kept = tuple(s for s in position.segments if s.first_step <= step)
    found = dataclasses.replace(position, segments=kept)
    for first_step, settings in [(step, current), *later]:
        found = _with_stage(found, mixtures, first_step, settings)
    return found


def _with_stage(
    before: Position, mixtures: Mapping[str, Mixture], step: int, settings: dict[str, Any]
) -> Position:
    last = before.segments[-1]
    settings = last.settings | settings
    if settings == last.settings:
        return before
    if settings | {"batch_size": last.batch_size} == last.settings:  # the same order
        first_sample, starts = before.first_sample(step), last.starts
    else:
        reached = tokens_reached(before, mixtures, step)
        first_sample, starts = 0, _starts(mixtures, settings, reached)
    place = {"first_step": step, "first_sample": first_sample, "starts": starts}
    return before.extended(dataclasses.replace(last, **place, **settings))


def _starts(
    mixtures: Mapping[str, Mixture], settings: Mapping[str, Any], reached: Mapping[str, int]
) -> tuple[int, ...]:
    """Return `Segment.starts` of an order that goes on after what was read of each source."""
    mixture = mixtures[settings["mixture_hash"]]
    samples = mixture.samples(settings["seq_len"], settings["packing"])
    starts = tuple(
        each.after(reached.get(source.fingerprint, 0))
        for source, each in zip(mixture.sources, samples, strict=True)
    )
    return starts if any(starts) else ()


def tokens_reached(
    position: Position, mixtures: Mapping[str, Mixture], step: int
) -> dict[str, int]:
    """Return how far each source was read before `step`: tokens, epochs included, by fingerprint.

    mixtures: by hash, all that the position has read since the step that `position.reached` is of.
    """
    found = dict(position.reached)
    ends = [segment.first_step for segment in position.segments[1:]] + [step]
    for segment, end in zip(position.segments, ends, strict=True):
        steps, mixture = min(end, step) - segment.first_step, mixtures.get(segment.mixture_hash)
        if steps <= 0 or mixture is None:
            continue
        counts = mixture.counts(segment.first_sample + steps * segment.batch_size)
        starts = segment.starts or (0,) * len(counts)
        samples = mixture.samples(segment.seq_len, segment.packing)
        for source, each, start, count in zip(
            mixture.sources, samples, starts, counts, strict=True
        ):
            tokens = each.tokens(start + count)
            found[source.fingerprint] = max(tokens, found.get(source.fingerprint, 0))
    return found


def left_out(
    position: Position,
    mixtures: Mapping[str, Mixture],
    *,
    to_step: int,
    at_step: int,
    borders: Iterable[int],
) -> tuple[Segment, dict[str, int]]:
    """Return how a run goes on from `to_step` without what the steps up to `at_step` read.

    That is the segment from `to_step` on, and how far each source was read. mixtures: as in
    `tokens_reached`. borders: first steps of stages; the segment has the settings of the stage that
    `to_step` is in.
    """
    end = min([at_step, *(border for border in borders if border > to_step)])
    segment, newest = position.segment(end - 1), position.segment(at_step - 1)
    reached = tokens_reached(position, mixtures, at_step)
    if segment.order == newest.order:
        read = (at_step - newest.first_step) * newest.batch_size
        starts, first_sample = segment.starts, newest.first_sample + read
    else:
        starts = _starts(mixtures, segment.settings, reached)
        first_sample = 0
    new = dataclasses.replace(segment, first_step=to_step, first_sample=first_sample, starts=starts)
    return new, reached
