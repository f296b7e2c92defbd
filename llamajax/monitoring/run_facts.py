"""`run.json`: what is known of a run beside its config and its metrics."""

import collections
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamajax.files import write_file
from llamajax.monitoring.events import is_running, load_events
from llamajax.monitoring.jsonl import read_object
from llamajax.monitoring.metrics import load_metrics

RUN_FACTS = "run.json"
SUMMARY = (
    "status", "starts", "rollbacks", "time_breakdown", "tokens_per_s", "peak_memory_bytes"
)  # fmt: skip
# Events that take time, and the part of `time_breakdown` that they belong to.
_PARTS = {
    "start": "start_s",
    "compile": "compile_s",
    "evaluation": "evaluation_s",
    "save": "checkpoint_s",
    "canary": "canary_s",
    "export": "export_s",
    "profile": "profile_s",
}


def write_run_facts(workdir: Path, facts: Mapping[str, Any]) -> None:
    """Write `facts`, and what events and rows say, to `workdir/run.json` atomically.

    Keys, all optional, null where unknown. What the last process found:
      platform             JAX platform, e.g. "cpu"
      device_kind          e.g. "NVIDIA H200"
      num_devices, num_processes
      profile              what is known and was decided of the machine: backends.machine_profile
      mesh                 {axis: size}
      attention, attention_reason   the kernel, and why it was taken
      compiler_options     {option: value} of XLA that the step was compiled with
      program              digest of the step's program; a plan of the same run has the same
      workdir_locked       whether a second run is kept out; false where the file system cannot
      lost_features        {feature: reason}: private parts of JAX or Orbax that have changed
      untested_versions    installed releases that the tests did not run with, ["jax 0.13.0"]
      versions             {"llamajax": ..., "jax": ..., "python": ...}
      num_parameters       integer
      peak_flops, peak_source   FLOP/s of one device, and who says so
      float8_products      "in 8 bits", or "rounded only" where the device is not known to have them
      packing              how instructions become samples in the first stage that has them:
                           `packing`, examples or windows; `efficiency`, the share of the positions
                           that hold tokens; shares of what is cut. Empty without instructions
      packing_problem      why many positions of that stage are padding; null where few are
      unigram_entropy      nats a token of the corpus: the loss of knowing frequencies only
      program_bytes        memory of one device that the compiled step asks for
      donated_bytes, reused_bytes   of the state on one device, given to the step, and used again
    And those of `summarize`. Raises OSError where the disk refuses.
    """
    merged = read_run_facts(workdir) | dict(facts)
    write_file(Path(workdir) / RUN_FACTS, json.dumps(merged, indent=1))


def write_report_facts(workdir: Path, facts: Mapping[str, Any]) -> None:
    """Bring `run.json` up to date with what a report computed of the run; raises OSError.

    The rest of `facts` was read before the rows, and a start may have written it anew since.
    """
    computed = {key: facts[key] for key in (*SUMMARY, "price_per_hour") if key in facts}
    path = Path(workdir) / RUN_FACTS
    write_file(path, json.dumps(read_object(path) | computed, indent=1))


def read_run_facts(workdir: Path) -> dict[str, Any]:
    """Return the facts of a run as they are now; empty where nothing can be read."""
    return merged_facts(workdir, load_events(workdir), load_metrics(workdir))


def merged_facts(
    workdir: Path, events: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what `run.json` says, and what the events and rows, read already, say now."""
    facts = read_object(Path(workdir) / RUN_FACTS)
    return facts | summarize(events, rows, running=is_running(workdir))


def summarize(
    events: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], *, running: bool
) -> dict[str, Any]:
    """Return what the events and rows of a run say of all its processes; empty without events.

    running: whether a process holds the run's lock. Keys, those of SUMMARY:
      status               "running", "finished", "stopped", or "dead": neither running nor ended
      starts, rollbacks    how many
      time_breakdown       seconds from the first start to the last event or row, `wall_s`, and what
                           they are made of: steps_s, redone_s (steps that were done again later),
                           rolled_back_s (steps that a rollback undid), data_wait_s, start_s,
                           compile_s, ..., down_s (no process), other_s; and goodput, the share of
                           steps_s
      tokens_per_s         tokens of all steps that count by steps_s
      peak_memory_bytes    most that one device has used
    """
    if not events:
        return {}
    last, kinds = events[-1], collections.Counter(event["event"] for event in events)
    first_s = events[0]["time_s"] - events[0].get("duration_s", 0.0)
    wall_s = max([e["time_s"] for e in events] + [r.get("time_s", 0.0) for r in rows]) - first_s
    parts = _time_parts(events, rows)
    tokens = parts.pop("tokens")
    peaks = [max(row["peak_memory_bytes"]) for row in rows if row.get("peak_memory_bytes")]
    status = "running" if running else "dead"
    return {
        "status": last["status"] if last["event"] == "end" else status,
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


def _time_parts(
    events: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> collections.Counter[str]:
    """Return the seconds of a run by part, and the tokens of the steps that count."""
    always = ("steps_s", "data_wait_s", "redone_s", "tokens")
    parts = collections.Counter(dict.fromkeys(always, 0.0))
    for row, before in _covered(events, rows):
        parts.update(_seconds(row, row["step"] - before))
    seen_s, undone = None, "redone_s"
    for event in events:
        kind, duration = event["event"], event.get("duration_s", 0.0)
        if kind == "start" and seen_s is not None:
            parts["down_s"] += max(0.0, event["time_s"] - duration - seen_s)
        for part in ("steps_s", "data_wait_s", "tokens"):
            parts[part] += event.get(f"kept_{part}", 0.0)
        undone = "rolled_back_s" if kind == "rollback" else undone
        if "removed_steps_s" in event:
            parts[undone] += event["removed_steps_s"]
        parts["data_wait_s"] += event.get("removed_data_wait_s", 0.0)
        if kind == "restore":
            parts[f"{event['source']}_s"] += duration
            undone = "redone_s"  # by the next start
        elif kind in _PARTS:
            parts[_PARTS[kind]] += duration
        seen_s = event.get("last_seen_s", event["time_s"])
    return parts


def _covered(
    events: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Yield each timed row and the step after which its means begin."""
    restores = collections.deque(event for event in events if event["event"] == "restore")
    before = 0
    for row in rows:
        if "step_time_s" in row and "time_s" in row:  # an earlier release's rows have no time
            # A row's means are over the steps since the last row, start or rollback.
            while restores and restores[0]["time_s"] <= row["time_s"]:
                before = restores.popleft()["step"]
            yield row, before
            before = row["step"]


def _seconds(row: Mapping[str, Any], count: int) -> dict[str, float]:
    """Return what `count` steps with the means of `row` add to the parts."""
    steps_s = count * row["step_time_s"]
    wait_s = count * row.get("data_wait_s", 0.0)
    return {
        "steps_s": steps_s, "data_wait_s": wait_s, "tokens": steps_s * (row["tokens_per_s"] or 0.0)
    }  # fmt: skip


def steps_after(
    events: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], step: int
) -> dict[str, float]:
    """Return what is known of the rows after `step`, which are about to be removed.

    removed_*: of their steps after `step`. kept_*: of their steps up to it, which still count.
    """
    found: collections.Counter[str] = collections.Counter()
    for row, before in _covered(events, rows):
        if row["step"] > step:
            kept = max(0, step - before)
            found.update({f"kept_{part}": value for part, value in _seconds(row, kept).items()})
            removed = _seconds(row, row["step"] - before - kept)
            found["removed_steps_s"] += removed["steps_s"]
            found["removed_data_wait_s"] += removed["data_wait_s"]
    return dict(found)
