"""Roll back to an earlier checkpoint within a run, or end the run where a check stops it."""

import dataclasses

from llamajax import data
from llamajax.checkpoint import CheckpointError
from llamajax.processes.host_collectives import broadcast_from_first
from llamajax.training.attempt import Attempt
from llamajax.training.safety.guard_stops import GuardStop, RollbackNeeded
from llamajax.training.safety.rollback_log import Rollback


def go_back(attempt: Attempt, problem: GuardStop | RollbackNeeded) -> int | None:
    """Record a rollback to an earlier checkpoint, or end the run and return its exit code.

    The run ends where a check stops it, or where it has gone back to one checkpoint as often as
    the config allows. To be called by all processes.
    """
    run, newest = attempt.run, attempt.run.box.newest_step
    attempt.record_saves()  # those that were complete before the check
    reason = "rollback" if isinstance(problem, RollbackNeeded) else "stop"
    box = attempt.write_box(reason, step=newest, cause=str(problem))
    stop = problem if isinstance(problem, GuardStop) else _roll_back(attempt, problem)
    if stop is None:
        return None
    run.say(
        f"error: {stop}. No later step was saved; the black box is {box}, and `python -m "
        f"llamajax.replay --workdir={run.workdir} --step={newest}` looks into the step "
        "(docs/guards.md)"
    )
    return stop.exit_code


def _roll_back(attempt: Attempt, cause: RollbackNeeded) -> GuardStop | None:
    """Choose the checkpoint to go back to and record the rollback; return why the run ends instead.

    The run then starts anew as after a kill: from the newest checkpoint, as later ones are removed.
    It skips the data of all steps from there to the one of `cause`: what led to the first update
    that was left out may lie before it. A run that is killed before the record of the rollback
    comes to the same step again.
    """
    run, checkpointer = attempt.run, attempt.run.checkpointer
    try:
        checkpointer.wait()
    except CheckpointError as error:
        attempt.progress.note(f"warning: {error}")
    to_step = broadcast_from_first(lambda: target(checkpointer.steps(), cause.first_skipped_step))
    if not to_step:  # no checkpoint at all: the beginning, or another run's
        origin = attempt.start.recorded["origin"]
        to_step = origin["step"] if origin else 0
    where = f"the checkpoint of step {to_step}" if to_step else "the beginning"
    times = sum(entry.to_step == to_step for entry in run.rollbacks.entries)
    if times >= run.config.guard.max_rollbacks:
        return GuardStop(f"{cause}; the run has gone back to {where} {times} times already")
    checkpointer.remove_after(to_step)
    segment, reached = data.left_out(
        attempt.start.position,
        run.setup.mixtures,
        to_step=to_step,
        at_step=cause.step,
        borders=run.setup.borders,
    )
    run.rollbacks.add(
        Rollback(
            at_step=cause.step,
            to_step=to_step,
            first_skipped_step=cause.first_skipped_step,
            segment=dataclasses.asdict(segment),
            reason=cause.reason,
            reached=reached,
        )
    )
    run.events.write("rollback", step=cause.step, to_step=to_step, reason=cause.reason)
    run.say(
        f"rolled back: {cause}. Going on from {where}, without the data of steps {to_step + 1} to "
        f"{cause.step} (audit.jsonl)"
    )
    return None


def target(steps: list[int], first_skipped_step: int) -> int | None:
    """Return the newest of the checkpoints before the updates that were left out.

    Where none is kept, the oldest after: its weights are the same, as nothing was applied since.
    """
    earlier = [step for step in steps if step < first_skipped_step]
    return max(earlier) if earlier else min(steps, default=None)
