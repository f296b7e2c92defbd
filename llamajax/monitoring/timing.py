"""Where the time of a run goes, measured so that it never flatters.

A step is dispatched long before it is done; it is done when its metrics have been fetched. So step
times are taken between fetches. What the loop does besides (compiling, evaluating, saving) is
taken out and accounted under its own name, but only while no step is in flight: time during which
the device also worked on a step stays in the step's time.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Mean over the steps between two fetches: seconds a step, tokens a second."""

    step_time_s: float
    tokens_per_s: float


class StepTimer:
    """Accounts every second of a run from its creation on.

        timer.mark_dispatched(n)        after the call of the jitted step n returns
        timer.mark_fetched(n)           after the metrics of step n arrived: a StepTime
        with timer.pause("evaluation"): anything that is not a step

    tokens_per_step: tokens of the global batch. clock: seconds, monotonic.
    """

    def __init__(self, *, tokens_per_step: int, clock: Callable[[], float] = time.monotonic):
        self._tokens_per_step = tokens_per_step
        self._clock = clock
        self._created_s = clock()
        self._fetched_s: float | None = None
        self._fetched_step: int | None = None
        self._dispatched_step: int | None = None
        self._paused_s = 0.0
        self._depth = 0
        self._steps = 0
        self._step_s = 0.0
        self._pauses_s: dict[str, float] = {}
        self._overlapped_s: dict[str, float] = {}

    def mark_dispatched(self, step: int) -> None:
        """Step `step` (n for the n-th update) has been handed to the device."""
        if self._fetched_s is None:
            self._fetched_s, self._fetched_step = self._clock(), step - 1
            self._paused_s = 0.0
        self._dispatched_step = step

    def mark_fetched(self, step: int) -> StepTime:
        """The metrics of `step` are on the host: the mean time of the steps since the last call."""
        assert self._fetched_s is not None
        assert self._fetched_step is not None
        if step <= self._fetched_step:
            raise ValueError(f"step {step} is fetched after step {self._fetched_step}")
        now = self._clock()
        count = step - self._fetched_step
        elapsed = now - self._fetched_s - self._paused_s
        self._steps += count
        self._step_s += elapsed
        self._fetched_s, self._fetched_step, self._paused_s = now, step, 0.0
        rate = count * self._tokens_per_step / elapsed if elapsed > 0 else 0.0
        return StepTime(step_time_s=elapsed / count, tokens_per_s=rate)

    @property
    def in_flight(self) -> bool:
        """Whether a step was dispatched whose metrics have not been fetched."""
        return self._dispatched_step is not None and self._dispatched_step != self._fetched_step

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Account the time inside as `kind`: compile, evaluation, checkpoint, data, ...

        Taken out of the step time only where no step is in flight. A pause inside another counts
        as the outer one.
        """
        in_flight = self.in_flight
        started = self._clock()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            elapsed = self._clock() - started
            if self._depth == 0:
                account = self._overlapped_s if in_flight else self._pauses_s
                account[kind] = account.get(kind, 0.0) + elapsed
                if not in_flight:
                    self._paused_s += elapsed

    def breakdown(self) -> dict[str, float]:
        """Seconds since creation by kind, for `run.json`: they add up to `wall_s`.

        Keys: `wall_s`, `steps_s`, one `KIND_s` a kind of pause, `other_s`; and, not seconds,
        `goodput`: the share of the wall time that was spent in steps.
        """
        wall = self._clock() - self._created_s
        kinds = {f"{kind}_s": seconds for kind, seconds in self._pauses_s.items()}
        other = wall - self._step_s - sum(kinds.values())
        return {
            "wall_s": wall,
            "steps_s": self._step_s,
            **kinds,
            "other_s": max(0.0, other),
            "goodput": self._step_s / wall if wall > 0 else 0.0,
        }

    def overlapped(self) -> dict[str, float]:
        """Seconds by kind of the pauses that a step in flight hid, wholly or in part."""
        return dict(self._overlapped_s)

    @property
    def mean_tokens_per_s(self) -> float | None:
        """Tokens a second over all steps fetched, or None before the first."""
        if self._step_s <= 0:
            return None
        return self._steps * self._tokens_per_step / self._step_s
