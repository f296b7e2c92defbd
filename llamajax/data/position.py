"""The position of a run in its data: a short list that only grows.

A position is a list of segments. Within one, step *n* reads the samples
`first_sample + (n - first_step) * batch_size ...` of the endless order of one mixture, cut into
samples of one length. A checkpoint saves nothing else of the data: resuming is arithmetic.
"""

import bisect
import dataclasses
from collections.abc import Mapping
from typing import Any

from llamajax.data.packing import EXAMPLES, WINDOWS
from llamajax.data.sample_order import FIRST_ROUNDS, ROUNDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """The steps from `first_step` until the next segment starts.

    rounds: of the shuffle. Positions saved before it was a choice do not contain it. starts: where
    the order begins in that of each source, after the samples that earlier stages read of it; empty
    where all begin at their first. packing: of instructions; text, always windows, ignores it.
    """

    first_step: int
    first_sample: int
    batch_size: int
    seq_len: int
    mixture_hash: str
    rounds: int = FIRST_ROUNDS
    starts: tuple[int, ...] = ()
    packing: str = WINDOWS

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Segment":
        """Return the segment of `dataclasses.asdict`, or of an earlier release; else TypeError."""
        return cls(**value | {"starts": tuple(value.get("starts", ()))})

    @property
    def settings(self) -> dict[str, Any]:
        """What the config says of the segment."""
        names = ("batch_size", "seq_len", "mixture_hash", "packing")
        return {name: getattr(self, name) for name in names}

    @property
    def order(self) -> tuple:
        """What two segments have in common where one goes on in the order of the other."""
        return self.seq_len, self.mixture_hash, self.packing, self.rounds, self.starts


@dataclasses.dataclass(frozen=True)
class Position:
    """Segments in order of `first_step`; where two start at one step, the later one counts.

    reached: how far each source was read or left out, in tokens, by its fingerprint, as the
    checkpoint or the rollback says from which the run goes on. The segments do not tell where their
    data is not open any more, or where a rollback left out what a later stage had read.
    """

    segments: tuple[Segment, ...]
    reached: Mapping[str, int] = dataclasses.field(default_factory=dict, compare=False)

    @classmethod
    def start(
        cls, *, batch_size: int, seq_len: int, mixture_hash: str, packing: str = EXAMPLES
    ) -> "Position":
        """Return the position of a run that has read nothing."""
        first = Segment(
            first_step=0,
            first_sample=0,
            batch_size=batch_size,
            seq_len=seq_len,
            mixture_hash=mixture_hash,
            rounds=ROUNDS,
            packing=packing,
        )
        return cls((first,))

    def until(self, step: int) -> "Position":
        """Return the position without the segments that begin at `step` or later, or the first."""
        kept = [s for s in self.segments[1:] if s.first_step < step]
        return dataclasses.replace(self, segments=(self.segments[0], *kept))

    def extended(self, segment: Segment) -> "Position":
        """Return the position with one more segment, from that one's first step on."""
        return dataclasses.replace(self, segments=(*self.segments, segment))

    def segment(self, step: int) -> Segment:
        """Return the segment of `step`."""
        starts = [segment.first_step for segment in self.segments]
        return self.segments[bisect.bisect_right(starts, step) - 1]

    def first_sample(self, step: int) -> int:
        """Return the index, in the endless order, of the first sample in the batch of `step`."""
        segment = self.segment(step)
        return segment.first_sample + (step - segment.first_step) * segment.batch_size

    def tokens_seen(self, step: int) -> int:
        """Count the tokens of the samples that the steps before `step` read."""
        ends = [s.first_step for s in self.segments[1:]] + [step]
        spans = zip(self.segments, ends, strict=True)
        return sum(
            max(0, min(end, step) - s.first_step) * s.batch_size * s.seq_len for s, end in spans
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value for `from_json`."""
        return {"segments": [dataclasses.asdict(s) for s in self.segments]}

    @classmethod
    def from_json(
        cls, value: dict[str, Any], *, reached: Mapping[str, int] | None = None
    ) -> "Position":
        """Return the position that `to_json` described; ValueError if it describes none.

        reached: as checkpoints have it; None in those of earlier releases.
        """
        try:
            segments = tuple(map(Segment.from_json, value["segments"]))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a position in the data: {value!r}") from error
        steps = [s.first_step for s in segments]
        if not segments or steps[0] != 0 or steps != sorted(steps):
            raise ValueError(f"not a position in the data: segments start at {steps}")
        return cls(segments, reached or {})
