"""Which of two runs has the lower loss, where both read the same samples at the same steps.

Most of the noise of a training loss is that of the samples, and falls out of the differences step
by step. What stays is correlated over steps: weights that have drifted apart stay apart for a
while. The interval is self-normalized (Kiefer, Vogelsang and Bunzel 2000; Shao 2010): its width
comes from the partial sums of the differences, so that no correlation time has to be estimated. It
is that of the newer half of the rows, and is looked at again whenever their number has doubled.
docs/monitoring.md has trials.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.monitoring.run_history import History

# Independent differences stay below 6.7 in 95 % of cases. With 20, runs that differ by chance alone
# are called different in at most 2.4 % of 2,500 simulations, if differences are correlated over up
# to a third of the rows; in 6 % for a random walk in five times its noise.
_CRITICAL = 20.0
_FIRST_LOOK = 64  # rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """The loss of one run minus that of another, in nats per token: mean of the newer half of rows.

    low, high: its 95 % interval. first_step, last_step: of that half. since: the step from which on
    every check finds the same sign; None where the last check finds no difference.
    """

    first_step: int
    last_step: int
    mean: float
    low: float
    high: float
    since: int | None

    def words(self, one: str, other: str) -> str:
        """Describe it in a line."""
        steps = f"steps {self.first_step:,} to {self.last_step:,}"
        found = f"{self.mean:+.4g} [{self.low:+.4g}, {self.high:+.4g}] nats a token over {steps}"
        if self.since is None:
            return f"{one} - {other}: {found}: no difference beyond chance"
        better = one if self.mean < 0 else other
        return f"{one} - {other}: {found}: {better} is better, seen from step {self.since:,} on"


def describe_comparison(one: str, other: str, *, names: Sequence[str]) -> str:
    """Compare the training losses of two runs in a line. names: of the runs there."""
    histories = [History.read(Path(workdir)) for workdir in (one, other)]
    losses = [
        {row["step"]: row["loss"] for row in history.rows if _is_finite(row.get("loss"))}
        for history in histories
    ]
    steps = sorted(losses[0].keys() & losses[1].keys())
    places = [_position(history.events) for history in histories]
    if len(steps) < _FIRST_LOOK:
        reason = f"{len(steps)} steps are logged in both; {_FIRST_LOOK} are needed"
    elif not all(places):
        reason = "a record does not say which samples were read"
    elif not _same_samples(*places, first=steps[0], last=steps[-1]):
        reason = "they read other samples at the same steps"
    else:
        found = paired_difference(steps, [losses[0][n] - losses[1][n] for n in steps])
        return found.words(*names)
    return f"{' - '.join(names)}: losses are not compared step by step: {reason}"


def paired_difference(steps: Sequence[int], differences: Sequence[float]) -> PairedDifference:
    """Return the mean difference with its interval. steps: of the differences, rising."""
    d = np.asarray(differences, np.float64)
    looks = [len(d)]
    while looks[-1] // 2 >= _FIRST_LOOK:
        looks.append(looks[-1] // 2)
    since = None
    sign = 0.0
    for count in reversed(looks):
        mean, half = _interval(d[count // 2 : count])
        found = math.copysign(1.0, mean) if abs(mean) > half else 0.0
        if found != sign:
            since, sign = (steps[count - 1] if found else None), found
    return PairedDifference(
        first_step=steps[len(d) // 2],
        last_step=steps[-1],
        mean=mean,
        low=mean - half,
        high=mean + half,
        since=since,
    )


def _interval(d: np.ndarray) -> tuple[float, float]:
    """Return the mean of differences, and half the width of its interval."""
    mean = float(d.mean())
    partial_sums = np.cumsum(d - mean)
    return mean, _CRITICAL * math.sqrt(float((partial_sums**2).sum())) / len(d) ** 1.5


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _position(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the segments of the newest position in the data, as `data.Position` writes them.

    Empty where the record has none, or what is none.
    """
    found = next((e["position"] for e in reversed(events) if "position" in e), None)
    numbers = ("first_step", "first_sample", "batch_size")
    is_one = isinstance(found, list) and all(
        isinstance(segment, dict) and all(isinstance(segment.get(n), int) for n in numbers)
        for segment in found
    )
    return found if is_one and found and found[0]["first_step"] == 0 else []


def _same_samples(
    one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], *, first: int, last: int
) -> bool:
    """Return whether two positions give steps `first` to `last` the same samples."""
    starts = {first - 1} | {s["first_step"] for s in (*one, *other)}
    return all(
        _place(one, before) == _place(other, before)
        for before in starts
        if first - 1 <= before < last
    )


def _place(segments: Sequence[Mapping[str, Any]], step: int) -> dict[str, Any]:
    """Return what the step after `step` reads, as a segment that begins there."""
    segment = [s for s in segments if s["first_step"] <= step][-1]
    read = (step - segment["first_step"]) * segment["batch_size"]
    # Records of earlier releases have no `starts`.
    place = {"starts": [], **segment, "first_step": step}
    return place | {"first_sample": segment["first_sample"] + read}
