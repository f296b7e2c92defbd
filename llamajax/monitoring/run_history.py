"""What earlier processes of a run have left in its directory: events, rows, the black box."""

import dataclasses
from pathlib import Path
from typing import Any

from llamajax.monitoring.blackbox import read_leftovers
from llamajax.monitoring.events import load_events
from llamajax.monitoring.jsonl import is_evaluation
from llamajax.monitoring.metrics import load_metrics
from llamajax.monitoring.run_facts import steps_after

_KEPT = "kept_steps_s"


@dataclasses.dataclass(frozen=True)
class History:
    """Events and rows that earlier processes of a run, or this one, have left in its directory."""

    workdir: Path
    events: list[dict[str, Any]]
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, workdir: Path) -> "History":
        """Read the events and rows that are on disk now."""
        return cls(workdir, load_events(workdir), load_metrics(workdir))

    def is_finished(self, step: int) -> bool:
        """Whether the last event says that the run finished at `step`."""
        last = self.events[-1] if self.events else {}
        return last.get("status") == "finished" and last["step"] == step

    def is_evaluated(self, step: int) -> bool:
        """Whether the evaluation of `step` is on record."""
        return any(row["step"] == step and is_evaluation(row) for row in self.rows)

    def time_after(self, step: int) -> dict[str, float]:
        """Return the seconds of the rows after `step`, which a start from there removes."""
        return steps_after(self.events, self.rows, step)

    def found_dead(self, step: int) -> dict[str, Any] | None:
        """Describe the last process if it wrote no end, for a start from `step`."""
        if not self.events or self.events[-1]["event"] == "end":
            return None
        begun = [event for event in self.events if event["event"] == "start"][-1:]
        box, box_s = read_leftovers(self.workdir)
        box = _after_rollback(box)
        seen = [*begun, self.events[-1], *self.rows, *box]
        return {
            "step": max(entry["step"] for entry in seen),
            "last_seen_s": max([box_s, *(entry.get("time_s", 0.0) for entry in seen)]),
            "host": begun[0].get("host") if begun else None,
            "pid": begun[0].get("pid") if begun else None,
        } | self.unlogged(step)

    def unlogged(self, step: int) -> dict[str, float]:
        """Return the seconds of a process's steps since its last row, from its black box.

        kept_*: of steps up to `step`, where the next start begins. removed_*: of later ones, which
        are done again.
        """
        box = _after_rollback(read_leftovers(self.workdir)[0])
        begun = max((i for i, e in enumerate(self.events) if e["event"] == "start"), default=0)
        counted = [row for row in self.rows if "step_time_s" in row]
        # A stop signal has the sums of the steps up to it in its event.
        counted += [e for e in self.events[begun:] if e["event"] == "signal" and _KEPT in e]
        logged = max((entry["step"] for entry in counted), default=0)
        parts = ("steps_s", "data_wait_s", "tokens")
        kept = total = dict.fromkeys(parts, 0)
        for row in box:  # each has the sums over all steps since the last row
            if row["step"] > logged and "unlogged_steps_s" in row:
                total = {part: row[f"unlogged_{part}"] for part in parts}
                kept = total if row["step"] <= step else kept
        removed = {f"removed_{part}": total[part] - kept[part] for part in parts[:2]}
        return {f"kept_{part}": value for part, value in kept.items()} | removed


def _after_rollback(box: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a black box that are not before its last rollback."""
    for i in range(1, len(box)):
        if box[-i]["step"] <= box[-i - 1]["step"]:
            return box[-i:]
    return box
