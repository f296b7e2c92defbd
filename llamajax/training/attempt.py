"""What the loop and its hooks use, from a start to the end of the run or to a rollback."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from llamajax.backends import report_alive
from llamajax.errors import ExitCode
from llamajax.monitoring import MetricsWriter, Progress, StepTimer, load_events
from llamajax.monitoring.blackbox import BLACKBOX
from llamajax.monitoring.sinks import open_sinks
from llamajax.training.programs import RunPrograms
from llamajax.training.run_record import write_end
from llamajax.training.run_start import Start
from llamajax.training.safety.hang import HangWatch
from llamajax.training.state import TrainState
from llamajax.training.workdir import Run


class Interrupted(Exception):
    """A stop signal came during an evaluation; raised on all processes."""


class Attempt:
    """What logs and times the steps from `start` on, until `stack` is closed.

    save_waits_s: by step, seconds that training waited for a checkpoint that is being written.
    """

    def __init__(
        self, run: Run, start: Start, programs: RunPrograms, stack: contextlib.ExitStack
    ) -> None:
        self.run, self.start, self.programs = run, start, programs
        self.save_waits_s: dict[int, float] = {}
        self.failed_saves = 0
        config, primary = run.config, run.is_primary
        self.timer = StepTimer(tokens_of=run.setup.tokens_of)
        self.metrics = MetricsWriter(  # rows of metrics.jsonl
            run.workdir,
            resume_step=start.step,
            primary=primary,
            open_sinks=lambda step: open_sinks(
                config.monitoring.sinks,
                run.workdir,
                after_step=step,
                config=start.recorded["config"],
            ),
        )
        self.progress = Progress(  # lines or a bar for people
            total_steps=config.train.steps,
            start_step=start.step,
            mode=config.monitoring.progress if primary else "none",
            title=run.name,
        )
        for each in (self.timer, self.metrics, self.progress):
            stack.callback(each.close)
        starts = sum(event["event"] == "start" for event in load_events(run.workdir) if primary)
        self.progress.set_cell("restarts", f"{max(0, starts - 1)}")
        if run.rollbacks.entries:
            self.progress.set_cell("rollbacks", f"{len(run.rollbacks.entries)}")
        stacks = run.workdir / BLACKBOX / f"hang_process{run.setup.machine.process_id}.txt"
        self.hang = HangWatch(config.guard.hang_timeout_s, file=stacks, on_hang=self._on_hang)

    def _on_hang(self, text: str) -> None:
        step = self.run.box.newest_step
        self.write_box("hang", step=step, cause=text)
        write_end(self.run, step, code=ExitCode.FAILED, error=text)

    def write_box(self, reason: str, *, step: int, **facts: Any) -> str:
        """Write the black box; return its path, or `not written`."""
        position = self.start.position.to_json()
        file = self.run.box.write(reason, step=step, position=position, **facts)
        return f"{file}" if file else "not written"

    @contextlib.contextmanager
    def phase(self, event: str, step: int) -> Iterator[dict[str, Any]]:
        """Write an event with the seconds that the block took; they do not count as step time."""
        fields: dict[str, Any] = {}
        try:
            with self.timer.pause():
                yield fields
        finally:  # also where a signal interrupts it
            self.run.events.write(event, step=step, duration_s=self.timer.paused_s, **fields)

    def begin_stage(self, step: int, state: TrainState) -> TrainState:
        """Say that update `step` begins a stage; return the state as one of that stage's model."""
        setup = self.run.setup
        number, c = setup.stage_number(step), setup.at(step).config.data
        words = f"{c.global_batch_size} x {c.seq_len} of {c.path}"
        tokens = self.start.position.tokens_seen(step - 1)
        fields = {"number": number, "tokens_seen": tokens, "reason": words}
        self.run.events.write("stage", step=step - 1, **fields)
        self.progress.note(f"stage {number} begins after step {step - 1}: {words}")
        return setup.at(step).spec.retyped(state)

    def report_alive(self) -> None:
        """Tell the launcher and the hang watch that something was finished."""
        report_alive()
        self.hang.beat()

    def report_part(self) -> None:
        """Report that a part of an evaluation is done. Raises Interrupted where the run stops.

        To be called by all processes.
        """
        self.report_alive()
        if self.run.shutdown.any_process_stops():
            raise Interrupted

    def record_saves(self) -> None:
        """Write an event for each checkpoint that is complete by now."""
        completed = self.run.checkpointer.completed
        while completed:
            step = completed.popleft()
            duration_s = self.save_waits_s.pop(step, 0.0)
            self.run.events.write("save", step=step, duration_s=duration_s)
            self.progress.set_cell("saved", f"{step:,} at {time.strftime('%H:%M')}")

    def record_signal(self, step: int) -> None:
        """Write the event of a stop signal, with the time of the steps after the last row."""
        unlogged = {f"kept_{part}": value for part, value in self.timer.untaken.items() if value}
        name = self.run.shutdown.signal  # none: it came to another process
        self.run.events.write("signal", step=step, signal=name, **unlogged)
