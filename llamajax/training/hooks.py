"""What a run does after certain steps: check replicas, save, export."""

import time

import jax

from llamajax import data
from llamajax.checkpoint import CheckpointError
from llamajax.processes.host_collectives import broadcast_from_first
from llamajax.training.attempt import Attempt
from llamajax.training.export import export_weights, exports_after
from llamajax.training.state import TrainState

# Process 0's clock decides when to save. Asking it waits for the devices, so it is asked rarely.
_COMPARE_CLOCKS_EVERY = 16


class Hook:
    """Something that is done after certain steps. `stop` is true where the run ends at this one."""

    def __init__(self, attempt: Attempt):
        self.attempt, self.run, self.config = attempt, attempt.run, attempt.run.config

    def is_due(self, step: int, stop: bool) -> bool:
        """Return whether the hook is called after `step`; the same on all processes."""
        raise NotImplementedError

    def __call__(self, step: int, state: TrainState, stop: bool) -> None:
        """Run the hook on the state after `step`. To be called by all processes."""
        raise NotImplementedError


class CanaryHook(Hook):
    """Raises BadDevice where devices that must have the same bits, computed or stored, have not."""

    def is_due(self, step: int, stop: bool) -> bool:
        every = self.config.guard.canary_every
        return every is not None and step % every == 0

    def __call__(self, step: int, state: TrainState, stop: bool) -> None:
        with self.attempt.phase("canary", step):
            self.attempt.programs.at(step).canary.check(step, state)
        self.attempt.report_alive()


class SaveHook(Hook):
    """Saves checkpoints. One that fails is a warning; only where the run ends is it an error."""

    def __init__(self, attempt: Attempt):
        super().__init__(attempt)
        self._saved_at_s = time.monotonic()

    def is_due(self, step: int, stop: bool) -> bool:
        steps, minutes = self.config.checkpoint.every_steps, self.config.checkpoint.every_minutes
        if stop or step == self.config.train.steps or (steps and step % steps == 0):
            return True
        late = minutes is not None and time.monotonic() - self._saved_at_s >= 60 * minutes
        if jax.process_count() == 1:
            return late
        return step % _COMPARE_CLOCKS_EVERY == 0 and broadcast_from_first(lambda: late)

    def __call__(self, step: int, state: TrainState, stop: bool) -> None:
        a, run = self.attempt, self.run
        final = stop or step == self.config.train.steps
        run.events.check_directory()
        with a.timer.pause(), a.hang.paused():
            try:
                run.checkpointer.wait()  # the one before, which may have failed meanwhile
            except CheckpointError as error:
                self._checkpoint_failed(error)
            try:
                saved = run.setup.at(step).spec.to_stored_order(state.to_save)
                reached = data.tokens_reached(a.start.position, run.setup.mixtures, step)
                read = {"ledger": a.start.ledger.to_json(), "reached": reached}
                meta = a.start.recorded | read
                run.checkpointer.save(step, saved, meta=meta, wait=final)
            except CheckpointError as error:
                self._checkpoint_failed(error, final=final)
                if final:
                    raise
        a.save_waits_s[step] = a.timer.paused_s
        a.record_saves()
        self._saved_at_s = time.monotonic()

    def _checkpoint_failed(self, error: CheckpointError, *, final: bool = False) -> None:
        a = self.attempt
        a.run.events.write("save", step=error.step, duration_s=0.0, error=str(error))
        a.failed_saves += 1
        if not final:
            a.progress.note(f"warning: {error}; training goes on, the next one is tried in turn")


class ExportHook(Hook):
    """Writes the weights of some steps in Hugging Face's format."""

    def is_due(self, step: int, stop: bool) -> bool:
        return not stop and exports_after(self.config, step)

    def __call__(self, step: int, state: TrainState, stop: bool) -> None:
        with self.attempt.phase("export", step), self.attempt.hang.paused():
            stored = self.run.setup.at(step).spec.to_stored_order(state)
            for line in export_weights(self.run, step, stored, self.attempt.start.recorded):
                self.attempt.progress.note(f"warning: {line}")
