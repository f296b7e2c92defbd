"""The loop: draw batch n, update, read the metrics of step n-1 meanwhile; evaluate, save, stop."""

import contextlib
import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from llamajax.backends import memory_in_use, report_alive
from llamajax.checkpoint import Checkpointer, CheckpointError
from llamajax.config.schema import CheckpointConfig, TrainConfig
from llamajax.monitoring import EventLog, MetricsWriter, Progress, StepTimer
from llamajax.training.decisions import agreed
from llamajax.training.safety.canary import Canary
from llamajax.training.safety.guardian import Guardian
from llamajax.training.safety.hang import HangWatch
from llamajax.training.safety.shutdown import Shutdown
from llamajax.training.state import TrainState

DeviceBatch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """Everything that the loop uses; `run` is the loop."""

    train: TrainConfig
    checkpoint: CheckpointConfig
    step: Callable[[TrainState, DeviceBatch], tuple[TrainState, dict[str, jax.Array]]]
    eval_step: Callable[[Any, DeviceBatch], tuple[jax.Array, jax.Array]]
    train_batches: Iterator[DeviceBatch]  # already on their way to the devices
    eval_batches: Callable[[], Iterator[DeviceBatch]] | None  # None: no validation split
    rates: Callable[[float], dict[str, float | None]]  # tokens/s -> both MFUs
    tokens_seen: Callable[[int], int]
    meta: Callable[[int], dict[str, Any]]
    at_rest: Callable[[TrainState], TrainState]  # as it is saved: layers in their own order
    export: Callable[[int, TrainState], None]  # of a state at rest, to hf/STEP
    checkpointer: Checkpointer
    metrics: MetricsWriter
    events: EventLog
    progress: Progress
    timer: StepTimer
    shutdown: Shutdown
    saw: Callable[[int], None]  # enters the samples of a step in the ledger
    guardian: Guardian
    hang: HangWatch
    canary: Canary | None
    saves_s: dict[int, float] = dataclasses.field(default_factory=dict)  # not yet complete
    failed_checkpoints: list[str] = dataclasses.field(default_factory=list)  # of this start

    def run(self, state: TrainState, start: int) -> int:
        """Train from step `start` to the end or to a signal; the step of the last checkpoint."""
        pending: tuple[int, dict[str, jax.Array]] | None = None
        saved_at_s, last = time.monotonic(), self.train.steps
        batch = self._next_batch() if start < last else None
        for step in range(start + 1, last + 1):
            self.timer.mark_dispatched(step)
            state, metrics = self.step(state, batch)
            self.timer.watch(step, functools.partial(jax.block_until_ready, metrics))
            self.shutdown.begin_updates()
            gc.enable()  # off while starting (train.py)
            self.saw(step)
            batch = self._next_batch() if step < last else None
            if pending is not None:
                self._log(*pending)  # waits for step - 1 while this one runs
                self.checkpointer.warm_up()  # not before a step was shown; the device is busy
            pending = (step, metrics)
            stop = agreed(step, self.shutdown)
            self._report_alive()
            self.record_saves()
            if stop:
                self.events.write("signal", step=step)
            save = stop or step == last or self._save_is_due(step, saved_at_s)
            evaluate = self.eval_is_due(step)
            examine = self.canary is not None and self.canary.is_due(step)
            if save or evaluate or examine:
                self._log(*pending)
                pending = None
            if examine:
                self._examine(step, state)  # before a save: what is saved was found sound
            if save:
                self._save(step, state, final=stop or step == last)
                saved_at_s = time.monotonic()
            if self.export_is_due(step) and not stop:
                with self._phase("export", step), self.hang.paused():
                    self.export(step, self.at_rest(state))
            if stop:
                return step
            if evaluate and not self.evaluate(step, state):
                self.events.write("signal", step=step)
                self._save(step, state, final=True)
                return step
        return last

    def _next_batch(self) -> DeviceBatch:
        with self.timer.pause(data_wait=True):
            return next(self.train_batches)

    @contextlib.contextmanager
    def _phase(self, event: str, step: int) -> Iterator[dict[str, Any]]:
        """Take the time inside out of the steps', and enter it as an event when it is over."""
        fields: dict[str, Any] = {}
        with self.timer.pause():
            yield fields
        self.events.write(event, step=step, duration_s=self.timer.paused_s, **fields)

    def eval_is_due(self, step: int) -> bool:
        """Whether an evaluation belongs to `step`."""
        every = self.train.eval_every
        due = step == self.train.steps or bool(every and step % every == 0)
        return due and self.eval_batches is not None

    def export_is_due(self, step: int) -> bool:
        """Whether the weights of `step` are wanted in Hugging Face's format."""
        every = self.checkpoint.export_hf_every
        return bool(every) and (step == self.train.steps or step % every == 0)

    def evaluate(self, step: int, state: TrainState) -> bool:
        """Log the loss on the validation split; False when a signal cut it short (no row then).

        Summed in float64 over batches of a fixed order. The last batch is padded, never dropped.
        """
        sums = np.zeros(2, np.float64)
        pending = None
        with self._phase("evaluation", step) as fields:
            for batch in self.eval_batches():
                current = self.eval_step(state.whole, batch)
                if pending is not None:
                    sums += np.array(jax.device_get(pending), np.float64)
                pending = current
                self._report_alive()
                if agreed(step, self.shutdown):
                    return False
            sums += np.array(jax.device_get(pending), np.float64)
            loss = fields["eval_loss"] = float(sums[0] / sums[1])
        row = {"step": step, "eval_loss": loss, "eval_perplexity": _perplexity(loss)}
        row |= {"eval_tokens": int(sums[1]), "time_s": self.events.time_s}
        self.metrics.write(row)
        self.progress.show(row)
        return True

    def _log(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Wait for the metrics of `step`; write them where a row is due, times as means since."""
        fetched = jax.device_get(metrics)
        self.timer.mark_fetched(step)
        values = self.guardian.look(step, fetched)
        due = step % self.train.log_every == 0 or step == self.train.steps
        if due or "update_skipped" in values:
            self._write(step, values)
        self.guardian.act(step, fetched)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        times = dataclasses.asdict(self.timer.take())
        row = {"step": step} | values | times | {"tokens_seen": self.tokens_seen(step)}
        row |= self.rates(times["tokens_per_s"]) | memory_in_use()
        row["time_s"] = self.events.time_s
        if self.failed_checkpoints:
            row["failed_checkpoints"] = len(self.failed_checkpoints)
        self.events.check_directory()
        self.metrics.write(row)
        self.progress.show(row)
        if not math.isfinite(values["loss"]) and "update_skipped" not in values:
            self.progress.note(f"warning: the loss of step {step} is {values['loss']}")

    def _examine(self, step: int, state: TrainState) -> None:
        with self._phase("canary", step):
            self.canary.check(step, state)
        self._report_alive()

    def _report_alive(self) -> None:
        report_alive()
        self.hang.beat()

    def _save_is_due(self, step: int, saved_at_s: float) -> bool:
        steps, minutes = self.checkpoint.every_steps, self.checkpoint.every_minutes
        if steps and step % steps == 0:
            return True
        late = minutes is not None and time.monotonic() - saved_at_s >= 60 * minutes
        return agreed(step, late)

    def _save(self, step: int, state: TrainState, *, final: bool) -> None:
        """Save; a failure costs the checkpoint and a warning, never the run, but for the last."""
        self.events.check_directory()
        with self.timer.pause(), self.hang.paused():
            try:
                self.checkpointer.wait()  # the one before, which may have failed meanwhile
            except CheckpointError as error:
                self._lack(error)
            try:
                saved = self.at_rest(state.to_save)
                self.checkpointer.save(step, saved, meta=self.meta(step), wait=final)
            except CheckpointError as error:
                self._lack(error, final=final)
                if final:
                    raise
        self.saves_s[step] = self.timer.paused_s
        self.record_saves()

    def record_saves(self) -> None:
        """Enter the checkpoints that are complete by now, and the time that each took."""
        while self.checkpointer.completed:
            step = self.checkpointer.completed.popleft()
            self.events.write("save", step=step, duration_s=self.saves_s.pop(step, 0.0))

    def _lack(self, error: CheckpointError, *, final: bool = False) -> None:
        self.events.write("save", step=error.step, duration_s=0.0, error=str(error))
        self.failed_checkpoints.append(str(error))
        if not final:
            self.progress.note(f"warning: {error}; training goes on, the next one is tried in turn")


def _perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
