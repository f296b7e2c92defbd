"""Going back to a checkpoint within a run, and on with other data."""

import dataclasses

from llamajax.checkpoint import Checkpointer, CheckpointError
from llamajax.processes.host_collectives import broadcast_from_first
from llamajax.training.safety.audit import Audit, Rollback
from llamajax.training.safety.guardian import Guardian, RolledBack, Stopped


def roll_back(
    cause: RolledBack, checkpointer: Checkpointer, audit: Audit, guardian: Guardian
) -> str:
    """Decide and note the return, in the audit and a black box; what to say of it.

    To be called by all processes. The run then starts anew as after a kill: from the newest
    checkpoint that the audit does not supersede. It skips the data of all steps from there to the
    one of `cause`: what led to the first update that was left out may lie before it. Raises Stopped
    after as many returns to one checkpoint as the config allows.
    """
    try:
        checkpointer.wait()
    except CheckpointError as error:
        guardian.note(f"warning: {error}")
    to_step = broadcast_from_first(lambda: target(checkpointer.steps(), cause.first_skipped_step))
    to_step = to_step or 0  # no checkpoint at all: the beginning
    where = f"the checkpoint of step {to_step}" if to_step else "the beginning"
    times, most = audit.returns_to(to_step), guardian.config.max_rollbacks
    if times >= most:
        raise Stopped(f"{cause}; the run has gone back to {where} {times} times already")
    position = guardian.position
    segment = dataclasses.replace(
        position.segment(cause.step),
        first_step=to_step,
        first_sample=position.first_sample(cause.step),
    )
    audit.add(
        Rollback(
            at_step=cause.step,
            to_step=to_step,
            first_skipped_step=cause.first_skipped_step,
            segment=dataclasses.asdict(segment),
            reason=cause.reason,
        )
    )
    return (
        f"rolled back: {cause}. Going on from {where}, without the data of steps {to_step + 1} to "
        f"{cause.step} (audit.jsonl)"
    )


def target(steps: list[int], first_skipped_step: int) -> int | None:
    """The newest of the checkpoints before the updates that were left out.

    Where none is kept, the oldest after: its weights are the same, as nothing was applied since.
    """
    earlier = [step for step in steps if step < first_skipped_step]
    return max(earlier) if earlier else min(steps, default=None)
