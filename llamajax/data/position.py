"""Where a run stands in its data, as a short list that only grows.

A position is a list of segments; within one, step *n* reads the samples
`first_sample + (n - first_step) * batch_size ...` of the endless order of one mixture cut into
samples of one length. Nothing else is ever saved of the data: resuming is arithmetic.
"""

import bisect
import dataclasses
from typing import Any

from llamajax.data.sample_order import FIRST_ROUNDS, ROUNDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Steps from `first_step` on, until the next segment starts.

    rounds: of the shuffle; positions saved before it was a choice do not say it.
    """

    first_step: int
    first_sample: int
    batch_size: int
    seq_len: int
    mixture_hash: str
    rounds: int = FIRST_ROUNDS


@dataclasses.dataclass(frozen=True)
class Position:
    """Segments in order of `first_step`; where two start at one step, the later one counts.

    What happens at a change, at the step where it happens:

    - batch size: the next sample is the one after the last sample read. Nothing is repeated or
      left out.
    - sequence length: as many tokens count as read as were read; the new order (another cut, so
      another permutation) goes on at the first of its samples after that many tokens. Unshuffled,
      nothing is repeated and less than one sample is left out. Shuffled, the count of epochs is
      kept; the rest of the epoch under way is a fresh draw, so it may meet text read earlier in
      this epoch: no cut of the unread pieces into longer samples could avoid that.
    - mixture (data, weights, seed, shuffle): as for the sequence length. New data is all unread
      wherever its order is entered, and data that stays does not start again from its first sample.
    """

    segments: tuple[Segment, ...]

    @classmethod
    def start(cls, *, batch_size: int, seq_len: int, mixture_hash: str) -> "Position":
        """The position of a run that has read nothing."""
        first = Segment(
            first_step=0,
            first_sample=0,
            batch_size=batch_size,
            seq_len=seq_len,
            mixture_hash=mixture_hash,
            rounds=ROUNDS,
        )
        return cls((first,))

    def continued(
        self, *, step: int, batch_size: int, seq_len: int, mixture_hash: str
    ) -> "Position":
        """This position from `step` on with these settings; itself where nothing changes."""
        last = self.segments[-1]
        if step < last.first_step:
            raise ValueError(f"step {step} lies before the last segment's {last.first_step}")
        if (batch_size, seq_len, mixture_hash) == (
            last.batch_size,
            last.seq_len,
            last.mixture_hash,
        ):
            return self
        tokens_read = self.first_sample(step) * last.seq_len
        segment = Segment(
            first_step=step,
            first_sample=-(-tokens_read // seq_len),
            batch_size=batch_size,
            seq_len=seq_len,
            mixture_hash=mixture_hash,
            rounds=last.rounds,
        )
        return Position((*self.segments, segment))

    def skipped(self, step: int, num_steps: int) -> "Position":
        """This position with the data of the steps `step ... step + num_steps - 1` left out:
        step `step` reads what step `step + num_steps` would have read."""
        last = self.segments[-1]
        if step < last.first_step or num_steps < 0:
            raise ValueError(f"cannot skip {num_steps} steps at {step}: {last.first_step=}")
        if num_steps == 0:
            return self
        segment = dataclasses.replace(
            last, first_step=step, first_sample=self.first_sample(step + num_steps)
        )
        return Position((*self.segments, segment))

    def segment(self, step: int) -> Segment:
        """The segment that `step` belongs to."""
        return self.segments[
            bisect.bisect_right(self.segments, step, key=lambda s: s.first_step) - 1
        ]

    def first_sample(self, step: int) -> int:
        """Index, in the endless order, of the first sample of the batch of `step`."""
        segment = self.segment(step)
        return segment.first_sample + (step - segment.first_step) * segment.batch_size

    def tokens_seen(self, step: int) -> int:
        """Tokens of the samples read by the steps before `step`, over all segments."""
        ends = [s.first_step for s in self.segments[1:]] + [step]
        spans = zip(self.segments, ends, strict=True)
        return sum(
            max(0, min(end, step) - s.first_step) * s.batch_size * s.seq_len for s, end in spans
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes this position."""
        return {"segments": [dataclasses.asdict(s) for s in self.segments]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Position":
        """The position that `to_json` described; ValueError if it describes none."""
        try:
            segments = tuple(Segment(**s) for s in value["segments"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a position in the data: {value!r}") from error
        steps = [s.first_step for s in segments]
        if not segments or steps[0] != 0 or steps != sorted(steps):
            raise ValueError(f"not a position in the data: segments start at {steps}")
        return cls(segments)
