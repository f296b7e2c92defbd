"""`report.html`: a run on one page that needs nothing else, also while it goes on.

Made only from files of the workdir: `config.json`, `metrics.jsonl`, `run.json`, `plan.json`.
Anything missing or null is left out or shown as unknown.
"""

import html
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from llamajax.config.saved_config import read_saved_config
from llamajax.errors import UserError
from llamajax.files import replaced_file
from llamajax.monitoring.metrics import METRICS, load_metrics
from llamajax.monitoring.progress import format_count, format_duration
from llamajax.monitoring.report.charts import Series, line_chart, smooth
from llamajax.monitoring.report.page import PAGE
from llamajax.monitoring.run_facts import read_run_facts, write_run_facts

REPORT = "report.html"
_SMOOTH_FROM = 100
_PHASES = {
    "steps_s": "training steps",
    "redone_s": "steps done again",
    "data_wait_s": "waiting for data",
    "start_s": "starting",
    "init_s": "initializing",
    "import_s": "importing weights",
    "restore_s": "restoring",
    "down_s": "between processes",
    "compile_s": "compiling",
    "evaluation_s": "evaluation",
    "checkpoint_s": "checkpoints",
    "other_s": "everything else",
}


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], float(row[key])) for row in rows if _is_number(row.get(key))]


def _last(points: Sequence[tuple[int, float]]) -> float | None:
    return points[-1][1] if points else None


def _number(value: Any, pattern: str) -> str:
    if not _is_number(value):
        return "unknown"
    return pattern.format(value) if math.isfinite(value) else "not finite"


def _tile(label: str, value: str, note: str = "") -> str:
    return (
        f'<div class="tile"><div class="label">{html.escape(label)}</div>'
        f'<div class="value">{html.escape(value)}</div>'
        f'<div class="note">{html.escape(note)}</div></div>'
    )


def _tiles(
    rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], facts: Mapping[str, Any]
) -> str:
    losses, evals = _column(rows, "loss"), _column(rows, "eval_loss")
    total = _section(config, "train").get("steps")
    done = max((row["step"] for row in rows), default=0)
    tiles = [_tile("steps", f"{done:,}", f"of {total:,}" if _is_number(total) else "")]
    tiles.append(_tile("training loss", _number(_last(losses), "{:.3f}"), "nats a token, last"))
    if evals:
        held_out = evals[-1][1]
        perplexity = f"perplexity {_perplexity(held_out)}, step {evals[-1][0]:,}"
        tiles.append(_tile("held-out loss", _number(held_out, "{:.3f}"), perplexity))
    if _is_number(unigram := facts.get("unigram_entropy")):
        tiles.append(_tile("unigram entropy", f"{unigram:.3f}", "loss of knowing frequencies only"))
    if seen := _column(rows, "tokens_seen"):
        tiles.append(_tile("tokens seen", format_count(seen[-1][1])))
    if speeds := [v for _, v in _column(rows, "tokens_per_s") if math.isfinite(v)]:
        mfu = _last(_column(rows, "mfu_full"))
        note = f"median; mfu {mfu * 100:.1f} %" if mfu is not None else "median"
        tiles.append(_tile("tokens a second", format_count(median(speeds)), note))
    if _is_number(wall := _section(facts, "time_breakdown").get("wall_s")):
        starts = facts.get("starts")
        tiles.append(_tile("time", format_duration(wall), f"{starts} starts" if starts else ""))
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.2f}" if math.isfinite(loss) and loss < 50 else "too large"


def _header(
    rows: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    workdir: Path,
) -> tuple[str, str]:
    """The title, and the heading with one line about what ran where."""
    name = str(_section(config, "model").get("name") or workdir.resolve().name)
    about = []
    if _is_number(count := facts.get("num_parameters")):
        about.append(f"{format_count(count)} parameters")
    if facts.get("platform"):
        devices, kind = facts.get("num_devices"), facts.get("device_kind") or facts["platform"]
        about.append(f"{devices} × {kind}" if devices else str(kind))
    if mesh := _section(facts, "mesh"):
        about.append("mesh " + " × ".join(f"{axis} {size}" for axis, size in mesh.items()))
    about += [f"{package} {version}" for package, version in _section(facts, "versions").items()]
    total, done = _section(config, "train").get("steps"), max((r["step"] for r in rows), default=0)
    status = facts.get("status") or ("finished" if rows and done == total else "in progress")
    heading = (
        f'<header><h1>{html.escape(name)} <span class="status">{html.escape(str(status))}</span>'
        f"</h1><p>{html.escape(' · '.join(about))}</p></header>"
    )
    return name, heading


def _warnings(rows: Sequence[Mapping[str, Any]]) -> str:
    broken = [row["step"] for row in rows if not _all_finite(row)]
    if not broken:
        return ""
    where = ", ".join(f"{step:,}" for step in broken[:5]) + (", …" if len(broken) > 5 else "")
    rows_are = "1 row is" if len(broken) == 1 else f"{len(broken)} rows are"
    return f'<p class="warning">{rows_are} not finite: step {where}</p>'


def _all_finite(row: Mapping[str, Any]) -> bool:
    return all(math.isfinite(value) for value in row.values() if isinstance(value, float))


def _charts(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    losses, evals = _column(rows, "loss"), _column(rows, "eval_loss")
    if len(losses) >= _SMOOTH_FROM:
        lines = [Series("each step", losses, "faint"), Series("training, mean", smooth(losses))]
    else:
        lines = [Series("training", losses)]
    lines.append(Series("held out", evals, "second", markers=True))
    unigram = facts.get("unigram_entropy")
    level = ("unigram entropy", float(unigram)) if _is_number(unigram) else None
    charts = [
        line_chart("Loss, nats a token", lines, format_value=_plain_number, level=level),
        line_chart(
            "Throughput, tokens a second",
            [Series("", _column(rows, "tokens_per_s"))],
            format_value=_round_count,
            zero=True,
        ),
        line_chart(
            "Learning rate",
            [Series("", _column(rows, "learning_rate"))],
            format_value=lambda v: f"{v:.1e}".replace("e-0", "e-") if v else "0",
            zero=True,
        ),
        line_chart(
            "Gradient norm", [Series("", _column(rows, "grad_norm"))], format_value=_plain_number
        ),
    ]
    return f'<section class="charts">{"".join(charts)}</section>'


def _round_count(value: float) -> str:
    """A round number without its idle zeros: 12k, 2.5M."""
    text = format_count(value)
    digits, unit = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + unit


def _plain_number(value: float) -> str:
    return f"{value:.4g}"


def _time(facts: Mapping[str, Any]) -> str:
    breakdown = _section(facts, "time_breakdown")
    phases = {
        key: float(seconds)
        for key, seconds in breakdown.items()
        if key.endswith("_s") and key != "wall_s" and _is_number(seconds) and seconds > 0
    }
    whole = sum(phases.values())
    if not whole:
        return ""
    ordered = sorted(phases.items(), key=lambda item: -item[1])
    bar = "".join(
        f'<span class="part part{i % 6}" style="width:{100 * seconds / whole:.2f}%"></span>'
        for i, (_, seconds) in enumerate(ordered)
    )
    lines = "".join(
        f'<tr><td><span class="swatch part{i % 6}"></span>{html.escape(_phase(key))}</td>'
        f'<td class="number">{html.escape(_seconds(seconds))}</td>'
        f'<td class="number">{100 * seconds / whole:.1f} %</td></tr>'
        for i, (key, seconds) in enumerate(ordered)
    )
    return (
        f'<section><h2>Where the time went</h2><div class="bar">{bar}</div>'
        f'<table class="time">{lines}</table></section>'
    )


def _phase(key: str) -> str:
    return _PHASES.get(key, key.removesuffix("_s").replace("_", " "))


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}s" if seconds < 10 else format_duration(seconds)


def _samples(facts: Mapping[str, Any]) -> str:
    samples = facts.get("samples")
    if not isinstance(samples, list):
        return ""
    blocks = "".join(
        f"<blockquote><b>{html.escape(str(sample.get('prompt', '')))}</b>"
        f"{html.escape(str(sample.get('text', '')))}</blockquote>"
        for sample in samples
        if isinstance(sample, Mapping)
    )
    return f"<section><h2>Samples</h2>{blocks}</section>" if blocks else ""


def _config_table(config: Mapping[str, Any]) -> str:
    if not config:
        return '<section><h2>Config</h2><p class="none">no config.json</p></section>'
    tables = []
    for name, section in config.items():
        entries = section if isinstance(section, Mapping) else {"": section}
        lines = "".join(
            f'<tr><td>{html.escape(str(key))}</td><td class="number">'
            f"{html.escape(_setting(value))}</td></tr>"
            for key, value in entries.items()
        )
        tables.append(f"<div><h3>{html.escape(str(name))}</h3><table>{lines}</table></div>")
    return f'<section><h2>Config</h2><div class="config">{"".join(tables)}</div></section>'


def _setting(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def render_report(workdir: Path) -> str:
    """The whole page as text."""
    rows, config, facts = load_metrics(workdir), read_saved_config(workdir), read_run_facts(workdir)
    title, heading = _header(rows, config, facts, workdir)
    body = "\n".join(
        [
            heading,
            _warnings(rows),
            _tiles(rows, config, facts),
            _charts(rows, facts),
            _time(facts),
            planned_section(workdir, facts, rows),
            _samples(facts),
            _config_table(config),
        ]
    )
    return PAGE.replace("{title}", html.escape(title)).replace("{body}", body)


def write_report(workdir: Path) -> Path:
    """Atomically write `workdir/report.html` and return its path.

    Raises UserError where `workdir` is no directory of a run, or cannot be written.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is not a directory; give the --workdir of a run")
    if not any((workdir / name).is_file() for name in (METRICS, "config.json")):
        raise UserError(
            f"--workdir={workdir} holds no run: neither {METRICS} nor config.json is there"
        )
    path = workdir / REPORT
    with replaced_file(path, label=str(path)) as hidden:
        write_run_facts(workdir, {})
        hidden.write_text(render_report(workdir), encoding="utf-8")
    return path


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


def planned_section(
    workdir: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> str:
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
