"""Measure the time of steps so that it is never too short.

A step is dispatched long before it is done. Its time is from the end of the step before it to its
own end, without what the loop did between the two while no step was in flight: waiting for a batch,
evaluating, saving. What a running step hides stays in the step's time.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator


class StepTimer:
    """Times the steps of a run, and what happens between them.

        timer.mark_dispatched(n)        before the jitted step n is called
        timer.watch(n, wait)            after; `wait` blocks until step n is done
        timer.mark_fetched(n)           after the metrics of step n arrived
        timer.take()                    means over the steps fetched since the last call
        with timer.pause():             anything that is not a step

    A step that is not watched counts as done when it is fetched. tokens_of: tokens of the global
    batch of a step. clock: seconds, monotonic. paused_s: seconds of the last pause in which no step
    was in flight.
    """

    def __init__(
        self, *, tokens_of: Callable[[int], int], clock: Callable[[], float] = time.monotonic
    ):
        self.paused_s = 0.0
        self._tokens_of, self._clock = tokens_of, clock
        self._fetched_step: int | None = None
        self._done_s: dict[int, float] = {}  # by step: the fetched one, and those in flight
        self._before: dict[int, tuple[float, float]] = {}  # by step: idle, and waiting for data
        self._since = (0.0, 0.0)  # the same, since the last dispatch
        self._depth = 0
        # Of the steps fetched since `take`: how many, tokens, seconds, and seconds of waiting.
        self._taken = (0, 0, 0.0, 0.0)
        self._watched: queue.SimpleQueue | None = None

    def mark_dispatched(self, step: int) -> None:
        """Note that step `step` (n for the n-th update) is about to be dispatched."""
        if self._fetched_step is None:
            self._fetched_step = step - 1
            self._done_s[step - 1] = self._clock()
            self._since = (0.0, self._since[1])
        self._before[step], self._since = self._since, (0.0, 0.0)

    def watch(self, step: int, wait: Callable[[], object]) -> None:
        """Note in a thread when `wait` returns: from then on the step is done."""
        if self._watched is None:
            self._watched = queue.SimpleQueue()
            threading.Thread(target=self._watch, name="step_timer", daemon=True).start()
        self._watched.put((step, wait))

    def _watch(self) -> None:
        while entry := self._watched.get():
            step, wait = entry
            with contextlib.suppress(RuntimeError):  # raised where the metrics are fetched, too
                wait()
                self.mark_done(step)

    def close(self) -> None:
        """End the thread that watches."""
        if self._watched is not None:
            self._watched.put(None)

    def mark_done(self, step: int) -> None:
        """Note that step `step` is done now, unless that is known already."""
        self._done_s.setdefault(step, self._clock())

    def mark_fetched(self, step: int) -> None:
        """Note that the metrics of `step` are on the host."""
        assert self._fetched_step is not None
        first = self._fetched_step + 1
        if step < first:
            raise ValueError(f"step {step} is fetched after step {self._fetched_step}")
        self.mark_done(step)
        before = [self._before.pop(n) for n in range(first, step + 1)]
        idle_s, wait_s = map(sum, zip(*before, strict=True))
        elapsed_s = max(0.0, self._done_s[step] - self._done_s[first - 1] - idle_s)
        for done in [n for n in list(self._done_s) if n < step]:
            del self._done_s[done]
        self._fetched_step = step
        count, tokens, steps_s, data_wait_s = self._taken
        tokens += sum(map(self._tokens_of, range(first, step + 1)))
        self._taken = (count + len(before), tokens, steps_s + elapsed_s, data_wait_s + wait_s)

    def take(self) -> dict[str, float]:
        """Return means over the steps fetched since the last call, of which there must be one.

        step_time_s; data_wait_s: seconds a step that the devices waited for its batch, which are
        not in step_time_s; tokens_per_s: tokens a second of step time.
        """
        count, tokens, steps_s, data_wait_s = self._taken
        self._taken = (0, 0, 0.0, 0.0)
        return {
            "step_time_s": steps_s / count,
            "data_wait_s": data_wait_s / count,
            "tokens_per_s": tokens / steps_s if steps_s > 0 else 0.0,
        }

    @property
    def untaken(self) -> dict[str, float]:
        """The seconds of the steps fetched since the last `take`, and of waiting; their tokens."""
        _, tokens, steps_s, data_wait_s = self._taken
        return {"steps_s": steps_s, "data_wait_s": data_wait_s, "tokens": tokens}

    @contextlib.contextmanager
    def pause(self, *, data_wait: bool = False) -> Iterator[None]:
        """Take the time inside out of the steps' time, as far as no step is in flight.

        data_wait: it is spent waiting for a batch. A pause inside another is part of the outer one.
        """
        started = self._clock()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                now = self._clock()
                newest = max(self._before, default=self._fetched_step)  # the one dispatched last
                if newest is not None:
                    started = max(started, self._done_s.get(newest, now))
                self.paused_s = max(0.0, now - started)
                idle_s, wait_s = self._since
                waited_s = self.paused_s if data_wait else 0.0
                self._since = (idle_s + self.paused_s, wait_s + waited_s)
