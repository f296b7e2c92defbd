"""The loop: update, read the metrics of the step before meanwhile, then run what is due."""

import functools
import gc

import jax

from llamajax.errors import ExitCode
from llamajax.training.feed import DeviceBatch, train_batches
from llamajax.training.hooks import (
    Attempt,
    CanaryHook,
    EvaluateHook,
    ExportHook,
    Hook,
    LogHook,
    SaveHook,
)
from llamajax.training.state import TrainState


def train_steps(attempt: Attempt, state: TrainState) -> ExitCode:
    """Train to the last step, or to a stop signal: FINISHED or STOPPED.

    Raises GuardStop, RollbackNeeded, and CheckpointError where the last save failed.
    """
    run, start, timer = attempt.run, attempt.start, attempt.timer
    last = run.config.train.steps
    log, save, evaluate = LogHook(attempt), SaveHook(attempt), EvaluateHook(attempt)
    export = ExportHook(attempt)
    # The canary comes before the save, so that no checkpoint holds what a bad device computed.
    hooks: list[Hook] = [CanaryHook(attempt), save, export, evaluate]
    if start.step:
        for hook in (evaluate, export):  # the previous process may have ended before these
            if hook.is_due(start.step, stop=False) and not hook.was_done():
                hook(start.step, state, stop=False)
    setup = run.setup
    batches = train_batches(
        run.config.data, setup.mesh, setup.mixture, start.position, step=start.step
    )

    def next_batch(step: int) -> DeviceBatch | None:
        """Draw the batch of a step. Waiting with no step in flight counts as `data_wait_s`."""
        with timer.pause(data_wait=True):
            return next(batches) if step <= last else None

    batch = next_batch(start.step + 1)
    for step in range(start.step + 1, last + 1):
        timer.mark_dispatched(step)
        state, metrics = attempt.programs.update(state, batch)
        timer.watch(step, functools.partial(jax.block_until_ready, metrics))
        run.shutdown.begin_updates()
        gc.enable()  # off while starting (train.py)
        start.ledger.add(step)
        batch = next_batch(step + 1)
        log(step, metrics)  # reads those of step - 1 while this step runs
        stop = run.shutdown.any_process_stops()
        attempt.report_alive()
        attempt.record_saves()
        due = [hook for hook in hooks if hook.is_due(step, stop)]
        if due:
            log.flush()  # now rather than a step later: the guard judges a step before it is saved
        if stop:
            attempt.record_signal(step)
        for hook in due:
            hook(step, state, stop)
        if evaluate.was_interrupted and not stop:
            stop = True
            attempt.record_signal(step)
            save(step, state, stop)
        if stop:
            return ExitCode.STOPPED
    # A signal may have come in the evaluation of the last step, before this loop or in it.
    return ExitCode.STOPPED if run.shutdown.requested else ExitCode.FINISHED
