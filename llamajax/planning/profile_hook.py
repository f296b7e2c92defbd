"""Trace some steps of a run, and say where their time went."""

import dataclasses
import json

import jax

from llamajax.config.forms import parse_steps
from llamajax.files import write_file
from llamajax.monitoring import load_metrics
from llamajax.planning.profile_summary import (
    kinds_of_operations,
    lines,
    measure,
    predicted,
    read_trace,
)
from llamajax.training.attempt import Attempt
from llamajax.training.hooks import Hook
from llamajax.training.state import TrainState

# What can fail while a trace begins, ends or is read; none of it may end a run.
_FAILURES = (
    RuntimeError,  # of JAX's profiler: a folder that cannot be written, another session
    OSError,  # a full disk
    # A trace or a program's text that has another form than this version of JAX writes:
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
)


class ProfileHook(Hook):
    """Traces the steps `monitoring.profile_steps` to `workdir/profile`, on process 0.

    The trace opens in Perfetto (`*.trace.json.gz`) and XProf. `summary.json` has its summary. Where
    one fails, a warning says so, and no other is made.
    """

    def __init__(self, attempt: Attempt):
        super().__init__(attempt)
        self._first, self._last = parse_steps(self.config.monitoring.profile_steps)
        self._folder, self._waited_s = self.run.workdir / "profile", 0.0
        self._traces = self._failed = False
        if self._first - 1 <= attempt.start.step < self._last:
            attempt.progress.note(
                f"warning: monitoring.profile_steps = {self._first}:{self._last}: this process "
                f"begins behind step {attempt.start.step}, and does not trace them"
            )

    def is_due(self, step: int, stop: bool) -> bool:
        ends = self._traces and (stop or step >= self._last)
        return ends or (step == self._first - 1 and not stop)

    def __call__(self, step: int, state: TrainState, stop: bool) -> None:
        with self.attempt.phase("profile", step), self.attempt.hang.paused():
            if self.run.is_primary and not self._failed:
                jax.block_until_ready(state)
                try:
                    self._begin_or_end(step)
                except _FAILURES as error:
                    self._failed = True
                    self.attempt.progress.note(
                        f"warning: monitoring.profile_steps: no profile in {self._folder}: "
                        f"{type(error).__name__}: {error}; training goes on"
                    )
        self._traces = not self._traces

    def _begin_or_end(self, step: int) -> None:
        if not self._traces:
            self._begin()
            return
        jax.profiler.stop_trace()
        if step == self._last:
            self._summarize()
        else:
            self.attempt.progress.note(
                f"profile  stopped behind step {step}, no summary: {self._folder}"
            )

    def _begin(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # a trace of Python slows the host, and hides the rest
        try:
            jax.profiler.start_trace(self._folder, profiler_options=options)
        except RuntimeError:  # a rollback left the last one running
            jax.profiler.stop_trace()
            jax.profiler.start_trace(self._folder, profiler_options=options)
        self._waited_s = self._data_wait_s()

    def _data_wait_s(self) -> float:
        """Return the seconds that steps waited for data so far."""
        total_s, before = self.attempt.timer.untaken["data_wait_s"], 0
        for row in load_metrics(self.run.workdir):
            if "data_wait_s" in row:
                total_s += row["data_wait_s"] * (row["step"] - before)
                before = row["step"]
        return total_s

    def _summarize(self) -> None:
        last = self._last
        setup, update = self.run.setup.at(last), self.attempt.programs.at(last).update
        text = update.as_text()
        module = text.split(maxsplit=2)[1].rstrip(",")
        busy = read_trace(self._folder, kinds_of_operations(text, setup), module)
        if not busy:
            self.attempt.progress.note(
                f"warning: the trace in {self._folder} names no operation of a device: no summary"
            )
            return
        found = measure(
            busy,
            num_steps=self._last - self._first + 1,
            data_wait_s=self._data_wait_s() - self._waited_s,
        )
        plan = predicted(setup, update)
        facts = {"steps": [self._first, self._last], "devices": len(busy), **found}
        facts["planned"] = plan and dataclasses.asdict(plan)
        write_file(self._folder / "summary.json", json.dumps(facts, indent=1) + "\n")
        self.attempt.progress.note(f"profile  steps {self._first} to {self._last}: {self._folder}")
        for line in lines(found, plan):
            self.attempt.progress.note(f"  {line}")
