"""What was planned beside what was measured: the section of a run's report that compares them.

The plan is `plan.json` in the run's directory (`plan --json=WORKDIR/plan.json`); the memory
of the compiled step (`program_bytes`) is known of every run.
"""

import html
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PLAN = "plan.json"
_GIB = 2**30


def read_plan(workdir: Path) -> dict[str, Any]:
    """The plan that lies beside a run; empty where there is none that can be read."""
    try:
        plan = json.loads((Path(workdir) / PLAN).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def compared(
    plan: Mapping[str, Any], facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, str, str]]:
    """(what, planned, measured, measured over planned) of everything that has both or a plan."""
    steps = [row["step_time_s"] for row in rows if isinstance(row.get("step_time_s"), float)]
    # the first steps warm caches up; the median of the rest is a step
    step = statistics.median(steps[len(steps) // 4 :]) if steps else None
    measured = {
        "memory of a device": facts.get("peak_memory_bytes"),
        "step": step,
        "tokens/s": facts.get("tokens_per_s"),
    }
    planned = {
        "memory of a device": plan.get("peak_bytes") or facts.get("program_bytes"),
        "step": plan.get("step_time_s"),
        "tokens/s": plan.get("tokens_per_s"),
    }
    units = {
        "memory of a device": lambda x: f"{x / _GIB:.3f} GiB",
        "step": lambda x: f"{x:.3f} s",
        "tokens/s": lambda x: f"{x:,.0f}",
    }
    found = []
    for what, show in units.items():
        first, second = planned[what], measured[what]
        if first:
            ratio = f"{second / first:.3f}" if second else ""
            found.append((what, show(first), show(second) if second else "unknown", ratio))
    return found


def section(workdir: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as HTML; empty where nothing was planned."""
    plan = read_plan(workdir)
    found = compared(plan, facts, rows)
    if not found:
        return ""
    lines = "".join(
        "<tr><td>" + '</td><td class="number">'.join(map(html.escape, row)) + "</td></tr>"
        for row in found
    )
    source = "of the compiled program"
    if plan.get("peak_bytes") or plan.get("step_time_s"):
        source = f"for {plan['devices']}"
    head = "".join(f"<th>{name}</th>" for name in ("", "planned", "measured", "ratio"))
    return (
        f"<section><h2>Planned and measured</h2><table><tr>{head}</tr>{lines}</table>"
        f'<p class="none">Planned {html.escape(source)}.</p></section>'
    )
