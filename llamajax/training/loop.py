"""The loop over steps: update, log, and then the hooks that are due.

`update` returns while the devices compute the step. Meanwhile the host draws the next batch, and
reads and checks the metrics of the step before. The hooks (check replicas, save, evaluate, export)
wait for the step. Every process runs the same hooks at the same steps.
"""

import functools
import gc
from collections.abc import Callable, Sequence

import jax

from llamajax.errors import ExitCode
from llamajax.training.attempt import Attempt, Interrupted
from llamajax.training.evaluation_hook import EvaluateHook
from llamajax.training.feed import DeviceBatch, train_batches
from llamajax.training.hooks import CanaryHook, ExportHook, Hook, SaveHook
from llamajax.training.log_hooks import LogHook, NormsHook
from llamajax.training.state import TrainState


def train_steps(
    attempt: Attempt, state: TrainState, more_hooks: Sequence[Callable[[Attempt], Hook]] = ()
) -> ExitCode:
    """Train to the last step, or to a stop signal: FINISHED or STOPPED.

    Raises what the checks and hooks raise: GuardStop (also for a device that computes wrongly),
    RollbackNeeded, and CheckpointError where an earlier save failed in the background.
    """
    run, setup, start, timer = attempt.run, attempt.run.setup, attempt.start, attempt.timer
    first, last = start.step + 1, run.config.train.steps
    log, save, evaluate = LogHook(attempt), SaveHook(attempt), EvaluateHook(attempt)
    export, norms = ExportHook(attempt), NormsHook(attempt, log)
    # The canary comes before the save, so that no checkpoint holds what a bad device computed.
    # The export comes after the evaluation, whose losses its model card shows.
    hooks: list[Hook] = [CanaryHook(attempt), norms, save, evaluate, export]
    hooks += [make(attempt) for make in more_hooks]

    def call(due: Sequence[Hook], step: int, stop: bool) -> bool:
        """Call hooks on the state; return whether the run stops, at this step."""
        if stop:
            attempt.record_signal(step)
        try:
            for hook in due:
                hook(step, state, stop)
        except Interrupted:  # in an evaluation; the next start does it again, and what follows
            attempt.record_signal(step)
            save(step, state, stop=True)  # does nothing where this step is saved already
            return True
        return stop

    # What the process before did not come to.
    missed = [evaluate] * start.evaluates + [export] * start.exports
    if call(missed, start.step, stop=False):
        return ExitCode.STOPPED
    data = run.config.data
    batches = train_batches(data, setup.mesh, setup.mixtures, start.position, step=start.step)

    def next_batch() -> DeviceBatch:
        with timer.pause(data_wait=True):  # a wait, unless the devices still compute a step
            return next(batches)

    batch = next_batch() if first <= last else None
    for step in range(first, last + 1):
        if step - 1 in setup.borders:  # of `data.stages`
            log.flush()  # the last row of the stage before
            state = attempt.begin_stage(step, state)
        timer.mark_dispatched(step)
        state, metrics = attempt.programs.at(step).update(state, batch)
        timer.watch(step, functools.partial(jax.block_until_ready, metrics))  # in another thread
        run.shutdown.begin_updates()  # until the first one a signal ends the process; now it saves
        gc.enable()  # off while starting (train.py)
        start.ledger.add(step)  # digest of the samples seen, which checkpoints hold
        batch = next_batch() if step < last else None
        log(step, metrics)  # reads those of step - 1
        stop = run.shutdown.any_process_stops()  # the same on all; the hosts agree, not the devices
        attempt.report_alive()
        attempt.record_saves()
        due = [hook for hook in hooks if hook.is_due(step, stop)]
        if due:
            log.flush()  # reads those of this step: a step is checked before it is saved
        if call(due, step, stop):
            return ExitCode.STOPPED
    return ExitCode.FINISHED
