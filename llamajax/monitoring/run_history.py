"""What the processes of a run have left in its directory: events, rows, the black box."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamajax.monitoring.blackbox import read_leftovers
from llamajax.monitoring.events import load_events
from llamajax.monitoring.jsonl import is_evaluation
from llamajax.monitoring.metrics import load_metrics

# Keys of `History.summary`.
SUMMARY = (
    "status", "starts", "rollbacks", "time_breakdown", "tokens_per_s", "peak_memory_bytes"
)  # fmt: skip
_COUNTED = ("steps_s", "data_wait_s", "tokens")
_PART_OF = {"save": "checkpoint"}  # of `time_breakdown`, where an event has another name


@dataclasses.dataclass(frozen=True)
class History:
    """Events and rows of all processes of a run up to now, in the order of their files."""

    workdir: Path
    events: list[dict[str, Any]]
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, workdir: Path) -> "History":
        """Read the events and rows that are on disk now."""
        return cls(workdir, load_events(workdir), load_metrics(workdir))

    @property
    def last(self) -> Mapping[str, Any]:
        """The newest event; empty where there is none."""
        return self.events[-1] if self.events else {}

    @property
    def first_s(self) -> float:
        """The time at which the first process began; of the first row where there are no events."""
        if self.events:
            return self.events[0]["time_s"] - self.events[0].get("duration_s", 0.0)
        return next((row["time_s"] for row in self.rows if "time_s" in row), 0.0)

    def is_finished(self, step: int) -> bool:
        """Whether the last event says that the run finished at `step`."""
        return self.last.get("status") == "finished" and self.last["step"] == step

    def is_evaluated(self, step: int) -> bool:
        """Whether the evaluation of `step` is on record."""
        return any(row["step"] == step and is_evaluation(row) for row in self.rows)

    def found_dead(self, step: int) -> dict[str, Any] | None:
        """Describe the last process if it wrote no end, for a start from `step`."""
        if self.last.get("event", "end") == "end":
            return None
        begun = [event for event in self.events if event["event"] == "start"][-1:]
        box, box_s = read_leftovers(self.workdir)
        seen = [*begun, self.last, *self.rows, *_after_rollback(box)]
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
        counted += [e for e in self.events[begun:] if e["event"] == "signal" and "kept_tokens" in e]
        logged = max((entry["step"] for entry in counted), default=0)
        kept = total = dict.fromkeys(_COUNTED, 0)
        for row in box:  # each has the sums over all steps since the last row
            if row["step"] > logged and "unlogged_steps_s" in row:
                total = {part: row[f"unlogged_{part}"] for part in _COUNTED}
                kept = total if row["step"] <= step else kept
        removed = {f"removed_{part}": total[part] - kept[part] for part in _COUNTED[:2]}
        return {f"kept_{part}": value for part, value in kept.items()} | removed

    def time_after(self, step: int) -> dict[str, float]:
        """Return the times of the rows after `step`, which a start from there removes.

        removed_*: of their steps after `step`. kept_*: of their steps up to it, which still count.
        """
        found: collections.Counter[str] = collections.Counter()
        for row, before in self._timed_rows():
            if row["step"] > step:
                kept = max(0, step - before)
                found.update({f"kept_{part}": s for part, s in _times(row, kept).items()})
                removed = _times(row, row["step"] - before - kept)
                found["removed_steps_s"] += removed["steps_s"]
                found["removed_data_wait_s"] += removed["data_wait_s"]
        return dict(found)

    def summary(self, *, running: bool) -> dict[str, Any]:
        """Return what is known of all processes of the run; empty without events.

        running: whether a process holds the run's lock. Keys, those of SUMMARY:
          status               "running", "finished", "stopped", or "dead": neither running nor
                               ended
          starts, rollbacks    how many
          time_breakdown       seconds from the first start to the last event or row, `wall_s`, and
                               what they are made of: steps_s, redone_s (steps that were done again
                               later), rolled_back_s (steps that a rollback undid), data_wait_s,
                               start_s, compile_s, ..., down_s (no process), other_s; and goodput,
                               the share of steps_s
          tokens_per_s         tokens of all steps that count by steps_s
          peak_memory_bytes    most that one device has used
        """
        if not self.events:
            return {}
        kinds = collections.Counter(event["event"] for event in self.events)
        seen = [entry.get("time_s", 0.0) for entry in (*self.events, *self.rows)]
        wall_s = max(seen) - self.first_s
        parts = self._time_parts()
        tokens = parts.pop("tokens")
        peaks = [max(row["peak_memory_bytes"]) for row in self.rows if row.get("peak_memory_bytes")]
        status = "running" if running else "dead"
        return {
            "status": self.last["status"] if self.last["event"] == "end" else status,
            "starts": kinds["start"],
            "rollbacks": kinds["rollback"],
            "time_breakdown": {
                "wall_s": wall_s,
                **parts,
                "other_s": max(0.0, wall_s - sum(parts.values())),
                "goodput": parts["steps_s"] / wall_s if wall_s > 0 else 0.0,
            },
            "tokens_per_s": tokens / parts["steps_s"] if parts["steps_s"] > 0 else None,
            "peak_memory_bytes": max(peaks, default=None),
        }

    def _time_parts(self) -> collections.Counter[str]:
        """Return the seconds of the run by part, and the tokens of the steps that count."""
        parts = collections.Counter(dict.fromkeys((*_COUNTED, "redone_s"), 0.0))
        for row, before in self._timed_rows():
            parts.update(_times(row, row["step"] - before))
        seen_s, undone = None, "redone_s"
        for event in self.events:
            kind, duration_s = event["event"], event.get("duration_s", 0.0)
            if kind == "start" and seen_s is not None:
                parts["down_s"] += max(0.0, event["time_s"] - duration_s - seen_s)
            if kind == "rollback":
                undone = "rolled_back_s"
            for part in _COUNTED:
                parts[part] += event.get(f"kept_{part}", 0.0)
            if "removed_steps_s" in event:
                parts[undone] += event["removed_steps_s"]
                parts["data_wait_s"] += event.get("removed_data_wait_s", 0.0)
            if kind == "restore":
                undone = "redone_s"  # by the next start
            if "duration_s" in event:
                parts[f"{event.get('source', _PART_OF.get(kind, kind))}_s"] += duration_s
            seen_s = event.get("last_seen_s", event["time_s"])
        return parts

    def _timed_rows(self) -> Iterator[tuple[Mapping[str, Any], int]]:
        """Yield each row that has times, and the step after which its means begin."""
        restores = collections.deque(event for event in self.events if event["event"] == "restore")
        before = 0
        for row in self.rows:
            if "step_time_s" in row and "time_s" in row:  # an earlier release's rows have no time
                # A row's means are over the steps since the last row, start or rollback.
                while restores and restores[0]["time_s"] <= row["time_s"]:
                    before = restores.popleft()["step"]
                yield row, before
                before = row["step"]


def _times(row: Mapping[str, Any], count: int) -> dict[str, float]:
    """Return the seconds and tokens of `count` steps with the means of `row`."""
    steps_s, tokens_per_s = count * row["step_time_s"], row["tokens_per_s"] or 0.0
    wait_s = count * row.get("data_wait_s", 0.0)
    return {"steps_s": steps_s, "data_wait_s": wait_s, "tokens": steps_s * tokens_per_s}


def _after_rollback(box: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a black box that are not before its last rollback."""
    for i in range(1, len(box)):
        if box[-i]["step"] <= box[-i - 1]["step"]:
            return box[-i:]
    return box
