"""How a check of a step ends a run, or sends it back.

The guard decides inside the step; its metrics are read one step later. They are replicated, so all
processes act alike without asking each other.
"""

from collections.abc import Mapping
from typing import Any

from llamajax.config.schema import GuardConfig
from llamajax.errors import ExitCode
from llamajax.optim.guard import REASONS


class GuardStop(Exception):
    """The run must end here, without saving; the message says why and what to do."""

    exit_code = ExitCode.GUARD_STOP


class BadDevice(GuardStop):
    """A device computes wrongly: the same devices would do so again."""

    exit_code = ExitCode.BAD_DEVICE


class RollbackNeeded(Exception):
    """The run must continue from before step `first_skipped_step`, after the data of `step`."""

    def __init__(self, *, step: int, first_skipped_step: int, reason: str):
        super().__init__(f"step {step}: {reason}")
        self.step, self.first_skipped_step, self.reason = step, first_skipped_step, reason


def stop_where_asked(step: int, metrics: Mapping[str, Any], config: GuardConfig) -> None:
    """Raise GuardStop or RollbackNeeded where an update was skipped and the config asks for it."""
    reason = int(metrics.get("update_skipped", 0))
    if not reason:
        return
    if config.nonfinite == "stop" and reason <= 2:
        raise GuardStop(
            f"the update of step {step} was left out, {REASONS[reason]}, and guard.nonfinite = stop"
        )
    in_a_row = int(metrics["skipped_in_a_row"])
    if config.max_in_a_row is None or in_a_row < config.max_in_a_row:
        return
    what = f"{in_a_row} updates in a row were left out, the last because {REASONS[reason]}"
    if config.then == "stop":
        raise GuardStop(f"step {step}: {what}, and guard.then = stop")
    raise RollbackNeeded(step=step, first_skipped_step=step - in_a_row + 1, reason=what)
