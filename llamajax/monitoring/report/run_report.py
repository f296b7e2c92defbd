"""`report.html`: a run on one page that needs nothing else, also while it goes on.

Made only from files of the workdir: `config.json`, `metrics.jsonl`, `run.json` and `plan.json`
(`plan --json=WORKDIR/plan.json`). Anything missing or null is left out or shown as unknown.
"""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from llamajax.errors import UserError
from llamajax.files import replaced_file
from llamajax.monitoring.jsonl import read_object
from llamajax.monitoring.metrics import METRICS, load_metrics
from llamajax.monitoring.report.charts import Series, line_chart, smooth
from llamajax.monitoring.report.page import PAGE
from llamajax.monitoring.row_format import format_count, format_duration
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

Row = Mapping[str, Any]


def write_report(workdir: Path) -> Path:
    """Write `workdir/report.html` atomically and return its path.

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


def render_report(workdir: Path) -> str:
    """Return the whole page as text."""
    rows, config = load_metrics(workdir), read_object(workdir / "config.json")
    facts, plan = read_run_facts(workdir), read_object(workdir / "plan.json")
    title = str(_section(config, "model").get("name") or workdir.resolve().name)
    body = "\n".join(
        [
            _header(title, rows, config, facts),
            _warnings(rows),
            _tiles(rows, config, facts),
            _charts(rows, facts),
            _time(facts),
            planned_and_measured(plan, facts, rows),
            _config_tables(config),
        ]
    )
    return PAGE.replace("{title}", html.escape(title)).replace("{body}", body)


def _section(config: Row, name: str) -> Row:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _column(rows: Sequence[Row], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of every row that has a number there."""
    return [(row["step"], float(row[key])) for row in rows if _is_number(row.get(key))]


def _table_rows(rows: Iterable[Sequence[str]]) -> str:
    """Return table rows from cells that are HTML already; all but the first hold numbers."""
    return "".join(
        "<tr><td>" + '</td><td class="number">'.join(cells) + "</td></tr>" for cells in rows
    )


def _header(title: str, rows: Sequence[Row], config: Row, facts: Row) -> str:
    """Return the heading with one line about what ran where."""
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
    return (
        f'<header><h1>{html.escape(title)} <span class="status">{html.escape(str(status))}</span>'
        f"</h1><p>{html.escape(' · '.join(about))}</p></header>"
    )


def _warnings(rows: Sequence[Row]) -> str:
    broken = [
        row["step"]
        for row in rows
        if not all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    ]
    if not broken:
        return ""
    where = ", ".join(f"{step:,}" for step in broken[:5]) + (", …" if len(broken) > 5 else "")
    rows_are = "1 row is" if len(broken) == 1 else f"{len(broken)} rows are"
    return f'<p class="warning">{rows_are} not finite: step {where}</p>'


def _tiles(rows: Sequence[Row], config: Row, facts: Row) -> str:
    def loss(points: Sequence[tuple[int, float]]) -> str:
        if not points:
            return "unknown"
        return f"{points[-1][1]:.3f}" if math.isfinite(points[-1][1]) else "not finite"

    losses, evals = _column(rows, "loss"), _column(rows, "eval_loss")
    total = _section(config, "train").get("steps")
    done = max((row["step"] for row in rows), default=0)
    tiles = [("steps", f"{done:,}", f"of {total:,}" if _is_number(total) else "")]
    tiles.append(("training loss", loss(losses), "nats per token, last"))
    if evals:
        step, held_out = evals[-1]
        small = math.isfinite(held_out) and held_out < 50
        perplexity = f"{math.exp(held_out):,.2f}" if small else "too large"
        tiles.append(("held-out loss", loss(evals), f"perplexity {perplexity}, step {step:,}"))
    if _is_number(unigram := facts.get("unigram_entropy")):
        tiles.append(("unigram entropy", f"{unigram:.3f}", "loss of knowing frequencies only"))
    if seen := _column(rows, "tokens_seen"):
        tiles.append(("tokens seen", format_count(seen[-1][1]), ""))
    if speeds := [v for _, v in _column(rows, "tokens_per_s") if math.isfinite(v)]:
        mfu = _column(rows, "mfu_full")
        note = f"median; mfu {mfu[-1][1] * 100:.1f} %" if mfu else "median"
        tiles.append(("tokens a second", format_count(median(speeds)), note))
    if _is_number(wall := _section(facts, "time_breakdown").get("wall_s")):
        starts = facts.get("starts")
        tiles.append(("time", format_duration(wall), f"{starts} starts" if starts else ""))
    shown = "".join(
        f'<div class="tile"><div class="label">{html.escape(label)}</div>'
        f'<div class="value">{html.escape(value)}</div>'
        f'<div class="note">{html.escape(note)}</div></div>'
        for label, value, note in tiles
    )
    return f'<section class="tiles">{shown}</section>'


def _charts(rows: Sequence[Row], facts: Row) -> str:
    losses, evals = _column(rows, "loss"), _column(rows, "eval_loss")
    if len(losses) >= _SMOOTH_FROM:
        lines = [Series("each step", losses, "faint"), Series("training, mean", smooth(losses))]
    else:
        lines = [Series("training", losses)]
    lines.append(Series("held out", evals, "second", markers=True))
    unigram = facts.get("unigram_entropy")
    level = ("unigram entropy", float(unigram)) if _is_number(unigram) else None

    def chart(title: str, key: str, **options: Any) -> str:
        return line_chart(title, [Series("", _column(rows, key))], **options)

    charts = [
        line_chart("Loss, nats per token", lines, format_value="{:.4g}".format, level=level),
        chart("Throughput, tokens a second", "tokens_per_s", format_value=_count, zero=True),
        chart("Learning rate", "learning_rate", format_value=_exponent, zero=True),
        chart("Gradient norm", "grad_norm", format_value="{:.4g}".format),
    ]
    return f'<section class="charts">{"".join(charts)}</section>'


def _exponent(value: float) -> str:
    """Format 0.0003 as 3.0e-4."""
    return f"{value:.1e}".replace("e-0", "e-") if value else "0"


def _count(value: float) -> str:
    """Format a round number without trailing zeros: 12k, 2.5M."""
    text = format_count(value)
    digits, unit = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + unit


def _time(facts: Row) -> str:
    phases = {
        key: float(seconds)
        for key, seconds in _section(facts, "time_breakdown").items()
        if key.endswith("_s") and key != "wall_s" and _is_number(seconds) and seconds > 0
    }
    whole = sum(phases.values())
    if not whole:
        return ""
    bar, lines = "", []
    ordered = sorted(phases.items(), key=lambda item: -item[1])
    for i, (key, seconds) in enumerate(ordered):
        part, percent = f"part{i % 6}", 100 * seconds / whole
        bar += f'<span class="part {part}" style="width:{percent:.2f}%"></span>'
        name = html.escape(_PHASES.get(key, key.removesuffix("_s").replace("_", " ")))
        time = f"{seconds:.2f}s" if seconds < 10 else format_duration(seconds)
        lines.append((f'<span class="swatch {part}"></span>{name}', time, f"{percent:.1f} %"))
    return (
        f'<section><h2>Where the time went</h2><div class="bar">{bar}</div>'
        f'<table class="time">{_table_rows(lines)}</table></section>'
    )


def planned_and_measured(plan: Row, facts: Row, rows: Sequence[Row]) -> str:
    """Return a table of what was planned beside what was measured; empty without a plan.

    plan: the object of `plan.json`; the memory of the compiled step is known of every run.
    """
    steps = [row["step_time_s"] for row in rows if isinstance(row.get("step_time_s"), float)]
    # the first steps warm caches up; the median of the rest is a step
    step_s = median(steps[len(steps) // 4 :]) if steps else None
    memory = plan.get("peak_bytes") or facts.get("program_bytes")
    lines = []
    for what, pattern, unit, planned, measured in (
        ("memory of a device", "{:.3f} GiB", 2**30, memory, facts.get("peak_memory_bytes")),
        ("step", "{:.3f} s", 1, plan.get("step_time_s"), step_s),
        ("tokens/s", "{:,.0f}", 1, plan.get("tokens_per_s"), facts.get("tokens_per_s")),
    ):
        if planned:
            shown = pattern.format(measured / unit) if measured else "unknown"
            ratio = f"{measured / planned:.3f}" if measured else ""
            lines.append((what, pattern.format(planned / unit), shown, ratio))
    if not lines:
        return ""
    source = "of the compiled program"
    if plan.get("peak_bytes") or plan.get("step_time_s"):
        source = f"for {plan['devices']}"
    head = "".join(f"<th>{name}</th>" for name in ("", "planned", "measured", "ratio"))
    return (
        f"<section><h2>Planned and measured</h2><table><tr>{head}</tr>{_table_rows(lines)}</table>"
        f'<p class="none">Planned {html.escape(source)}.</p></section>'
    )


def _config_tables(config: Row) -> str:
    if not config:
        return '<section><h2>Config</h2><p class="none">no config.json</p></section>'
    tables = ""
    for name, section in config.items():
        lines = []
        for key, value in (section if isinstance(section, Mapping) else {"": section}).items():
            shown = value if isinstance(value, str) else json.dumps(value)
            lines.append((html.escape(str(key)), html.escape("none" if value is None else shown)))
        title = html.escape(str(name))
        tables += f"<div><h3>{title}</h3><table>{_table_rows(lines)}</table></div>"
    return f'<section><h2>Config</h2><div class="config">{tables}</div></section>'
