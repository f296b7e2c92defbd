"""What the page shows of one run, as JSON values, from the files of its workdir.

Everything in them may be missing, of an earlier release, or cut: what is not known is left out.
"""

import collections
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from llamajax.errors import ExitCode
from llamajax.monitoring.blackbox import BLACKBOX, boxes
from llamajax.monitoring.jsonl import read_object, read_rows
from llamajax.monitoring.metrics import SAMPLES
from llamajax.monitoring.report.curves import Row, curves, is_number
from llamajax.monitoring.run_facts import facts_of
from llamajax.monitoring.run_history import History

_MAX_EVENTS, _MAX_SAMPLES, _MAX_TEXT = 500, 60, 4000
_NOT_SHOWN = {"versions", "command", "git", "overrides", "changed"}  # of events: processes have it


def read_run(workdir: Path, *, cells: int) -> dict[str, Any]:
    """Return what the page shows of a run. cells: how many numbers the curves may have.

    `facts` is `run.json` as it is now.
    """
    workdir = Path(workdir).absolute()
    history = History.read(workdir)
    events, rows, first_s = history.events, history.rows, history.first_s
    rows.sort(key=lambda row: row["step"])
    config, facts = read_object(workdir / "config.json"), facts_of(history)
    drawn = curves(rows, first_s=first_s, cells=cells)
    processes = list(_processes(history, facts.get("status")))
    return {
        "name": _name(config, workdir),
        "workdir": str(workdir),
        "steps": section(config, "train").get("steps"),
        "step": max([row["step"] for row in rows] + [e["step"] for e in events], default=0),
        "first_s": first_s,
        "verdict": _verdict(config, facts, history, drawn),
        "curves": drawn,
        "facts": facts,
        "config": config,
        "data": prepared_data(workdir, config),
        "plan": read_object(workdir / "plan.json"),
        "measured": _measured(rows, facts),
        "processes": processes,
        "devices": _mean_devices(processes, facts),
        "events": list(_events(history)),
        "left_out_events": max(0, len(events) - _MAX_EVENTS),
        "kept_checkpoints": _kept_checkpoints(workdir),
        "samples": _samples(workdir),
        "profile": read_object(workdir / "profile" / "summary.json"),
    }


def section(values: Row, name: str) -> Row:
    """Return an object of an object; empty where there is none."""
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def _name(config: Row, workdir: Path) -> str:
    return str(section(config, "train").get("name") or workdir.resolve().name)


def _verdict(config: Row, facts: Row, history: History, drawn: Row) -> dict[str, Any]:
    """Return how the run stands: `status`, what happened (`incidents`), and a `level`.

    level: good only where it finished and nothing happened; info while it runs; warn; bad where it
    died or ended with an error.
    """
    kinds = collections.Counter(event["event"] for event in history.events)
    failed_saves = sum(e["event"] == "save" and "error" in e for e in history.events)
    counts = (
        (kinds["start"] - 1, "restart", "restarts"),
        (kinds["skipped_update"], "skipped update", "skipped updates"),
        (kinds["rollback"], "rollback", "rollbacks"),
        (failed_saves, "failed checkpoint", "failed checkpoints"),
        (drawn["nonfinite_rows"], "row that is not finite", "rows that are not finite"),
    )
    incidents = [f"{n} {many if n > 1 else one}" for n, one, many in counts if n > 0]
    last, total = history.last, section(config, "train").get("steps")
    done = is_number(total) and drawn["train"]["step"][-1:] == [total]
    status = str(facts.get("status") or ("finished" if done else "in progress"))
    error, code = str(last.get("error") or ""), last.get("code", ExitCode.FINISHED)
    if code not in (ExitCode.FINISHED, ExitCode.STOPPED):
        error = error or f"ended with exit code {code}: see the last lines of train.log"
    level = {"running": "info", "in progress": "info", "stopped": "warn", "dead": "bad"}
    found = level.get(status, "good" if status == "finished" else "warn")
    if error:
        found = "bad"
    elif incidents and found != "bad":
        found = "warn"
    said = [status, *incidents, *filter(None, [error])]
    return {"status": status, "incidents": incidents, "level": found, "error": error, "said": said}


def _measured(rows: Sequence[Row], facts: Row) -> dict[str, Any]:
    """Return what is compared with the plan: medians without the first quarter of the rows."""
    found = {key: facts.get(key) for key in ("peak_memory_bytes", "tokens_per_s")}
    for key in ("step_time_s", "mfu_full", "mfu_causal"):
        # the first steps warm caches up
        values = [row[key] for row in rows if is_number(row.get(key))]
        found[key] = median(values[len(values) // 4 :]) if values else None
    return {k: v for k, v in found.items() if is_number(v) and math.isfinite(v)}


def _processes(history: History, status: Any) -> Iterator[dict[str, Any]]:
    """Yield each process of the run: when, on what, how it ended, and what its start cost.

    lost_s: seconds of steps that are done again, of no process, and up to the compiled program.
    """
    events, rows, first_s = history.events, history.rows, history.first_s
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    seen_s = None
    for i, end in itertools.pairwise([*starts, len(events)]):
        start, own = events[i], list(events[i:end])
        is_last, dead = end == len(events), None
        if own[-1]["event"] == "found_dead":  # the next one has found this one dead
            dead = own.pop()
        began_s = start["time_s"] - start.get("duration_s", 0.0)
        seen = [own[-1]["time_s"], dead["last_seen_s"] if dead else 0.0]
        if is_last and own[-1]["event"] != "end":
            seen += [row["time_s"] for row in rows if is_number(row.get("time_s"))]
        how = status if is_last else "killed"
        if own[-1]["event"] == "end":
            how = own[-1].get("error") or own[-1].get("status")
        lost_s = 0.0
        if seen_s is not None:
            compiled = next((n for n, e in enumerate(own) if e["event"] == "compile"), len(own))
            lost_s = max(0.0, began_s - seen_s) + sum(
                e.get("duration_s", 0.0) + e.get("removed_steps_s", 0.0)
                for e in own[: compiled + 1]
            )
        seen_s = max(seen)
        yield {
            "step": start["step"],
            "from_s": round(began_s - first_s, 2),
            "to_s": round(seen_s - first_s, 2),
            "end": how,
            "devices": start.get("num_devices"),
            "lost_s": lost_s,
            "parts": _parts(own, first_s, shortest_s=(seen_s - began_s) / 500),
            **{k: start.get(k) for k in ("host", "pid", "device_kind", *sorted(_NOT_SHOWN))},
        }


def _parts(events: Sequence[Row], first_s: float, *, shortest_s: float) -> list[list[Any]]:
    """Return [kind, from, to] of the events that take long enough to be drawn."""
    return [
        [e.get("source", e["event"]), round(e["time_s"] - e["duration_s"] - first_s, 2),
         round(e["time_s"] - first_s, 2)]
        for e in events
        if e.get("duration_s", 0.0) > shortest_s
    ][:400]  # fmt: skip


def _mean_devices(processes: Sequence[Row], facts: Row) -> float | None:
    """Return the devices of a run, weighted by the time of its processes where they differ."""
    counts = {process["devices"] for process in processes}
    if len(counts) < 2 or not all(map(is_number, counts)):
        return next(iter(counts), None) or facts.get("num_devices")
    seconds = [process["to_s"] - process["from_s"] for process in processes]
    weighted = sum(s * p["devices"] for s, p in zip(seconds, processes, strict=True))
    return weighted / sum(seconds) if sum(seconds) else None


def _events(history: History) -> Iterator[dict[str, Any]]:
    """Yield the newest events; a skipped update has its samples and its black box."""
    written = {box.name: box for box in boxes(history.workdir)}
    for event in history.events[-_MAX_EVENTS:]:
        shown = {k: v for k, v in event.items() if k not in _NOT_SHOWN | {"time_s"}}
        shown["at_s"] = round(event["time_s"] - history.first_s, 2)
        for reason in ("skip", "spike") if event["event"] == "skipped_update" else ():
            if box := written.get(f"{event['step']}_{reason}.jsonl"):
                head = next(iter(read_rows(box)), {})
                shown |= {"box": f"{BLACKBOX}/{box.name}", "samples": head.get("sample_ids")}
        yield shown


def prepared_data(workdir: Path, config: Row) -> list[dict[str, Any]]:
    """Return the prepared directories, each with the page of its inspection if there is one."""
    paths = [Path(path) for path in str(section(config, "data").get("path") or "").split(",")]
    pages = [(path, path / "inspect.html") for path in paths if path.name]
    return [
        {"path": str(path), "page": os.path.relpath(page, workdir) if page.is_file() else None}
        for path, page in pages
    ]


def _kept_checkpoints(workdir: Path) -> list[str] | None:
    """Return the names of the checkpoints that are still there; None where they are elsewhere."""
    folder = workdir / "checkpoints"
    return [path.name for path in folder.iterdir()] if folder.is_dir() else None


def _samples(workdir: Path) -> list[dict[str, Any]]:
    """Return step, prompt and text of the newest rows of `samples.jsonl`."""
    return [
        {"step": row["step"], **{k: str(row.get(k) or "")[:_MAX_TEXT] for k in ("prompt", "text")}}
        for row in read_rows(workdir / SAMPLES)[-_MAX_SAMPLES:]
    ]
