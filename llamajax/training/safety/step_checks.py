"""React to an update that the guard skipped: warn, stop, or roll back.

The guard decides inside the step; its metrics are read one step later. All numbers here are
replicated, so all processes act alike without asking each other.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from llamajax import data
from llamajax.errors import ExitCode
from llamajax.optim.guard import REASONS

if TYPE_CHECKING:  # it imports grain, and `benchmarks/accelerator.py` does without
    from llamajax.training.workdir import Run

_SHOWN_IDS = 8


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


@dataclasses.dataclass(frozen=True)
class StepChecks:
    """Checks the metrics of each step: `inspect` before its row is written, `react` after."""

    run: "Run"
    position: "data.Position"
    weights: tuple[str, ...]  # names of what is trained, in the order of its norms
    note: Callable[[str], None]
    _warned: list[str] = dataclasses.field(default_factory=list)

    def inspect(
        self, step: int, metrics: Mapping[str, Any], times: Mapping[str, float]
    ) -> dict[str, Any]:
        """Return the row of `step`; enter it in the black box; warn of an update left out.

        times: for the black box alone.
        """
        plain = {name: value.item() for name, value in metrics.items() if value.ndim == 0}
        segment = self.position.segment(step - 1)
        norms = zip(self.weights, metrics.get("weight_norms", np.zeros(0)), strict=False)
        row = {"step": step, "first_sample": self.position.first_sample(step - 1)}
        row |= (
            {"batch_size": segment.batch_size, "seed": self.run.config.train.seed} | times | plain
        )
        self.run.box.add(row | {f"norm/{name}": norm.item() for name, norm in norms})
        reason = plain.pop("update_skipped", None)
        for internal in ("skipped_in_a_row", "loss_limit", "grad_norm_limit"):
            plain.pop(internal, None)
        if plain.get("split_attention") == 0:
            del plain["split_attention"]
        elif "split_attention" in plain and not self._warned:
            self._warned.append("split_attention")
            self.note(
                f"warning: step {step} was slower: its documents are too many for cuDNN's kernel, "
                "so that attention was `split`. Rows of such steps have split_attention. Longer "
                "documents, or data.mask_documents=false, avoid it"
            )
        if not reason:
            return plain
        self._warn(step, reason, metrics)
        return plain | {"update_skipped": REASONS[reason]}

    def react(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Raise GuardStop or RollbackNeeded where the config asks for it."""
        reason = int(metrics.get("update_skipped", 0))
        if not reason:
            return
        in_a_row, config = int(metrics["skipped_in_a_row"]), self.run.config.guard
        if config.nonfinite == "stop" and reason <= 2:
            raise GuardStop(
                f"the update of step {step} was left out, {REASONS[reason]}, and guard.nonfinite "
                "= stop"
            )
        if config.max_in_a_row is None or in_a_row < config.max_in_a_row:
            return
        what = f"{in_a_row} updates in a row were left out, the last because {REASONS[reason]}"
        if config.then == "stop":
            raise GuardStop(f"step {step}: {what}, and guard.then = stop")
        raise RollbackNeeded(step=step, first_skipped_step=step - in_a_row + 1, reason=what)

    def write_box(self, reason: str, *, step: int, **facts: Any) -> str:
        """Write the black box; return its path, or `not written`."""
        file = self.run.box.write(reason, step=step, position=self.position.to_json(), **facts)
        return f"{file}" if file else "not written"

    def _warn(self, step: int, reason: int, metrics: Mapping[str, Any]) -> None:
        mixture = self.run.setup.mixtures[self.position.segment(step - 1).mixture_hash]
        ids = data.sample_ids(mixture, self.position, step - 1).tolist()
        spiked = reason in (3, 4)
        file = self.write_box("spike" if spiked else "skip", step=step, sample_ids=ids)
        for event in ("spike", "skipped_update") if spiked else ("skipped_update",):
            self.run.events.write(event, step=step, reason=REASONS[reason])
        shown = ", ".join(map(str, ids[:_SHOWN_IDS]))
        more = f" and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else ""
        numbers = []
        for key, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
            limit = float(metrics[f"{key}_limit"])
            allowed = f" (limit {limit:.4g})" if np.isfinite(limit) else ""
            numbers.append(f"{name} {float(metrics[key]):.4g}{allowed}")
        self.note(
            f"warning: step {step}: update skipped, {REASONS[reason]}: {', '.join(numbers)}; "
            f"{int(metrics['skipped_in_a_row'])} in a row, {int(metrics['skipped_updates'])} in "
            f"all; samples {shown}{more}; black box {file}"
        )
