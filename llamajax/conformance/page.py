"""The doctor's findings as one self-contained HTML page, to look at and to send to a vendor."""

import html
import itertools
from collections.abc import Iterator
from typing import Any

from llamajax.backends import Probe as Outcome
from llamajax.backends import Verdict
from llamajax.backends.stored_verdict import NOT_READY
from llamajax.conformance.printed_findings import consequences, counts
from llamajax.conformance.table import probe
from llamajax.monitoring.report.page import PAGE

_STYLE = """<style>
.status.bad { color: var(--bad); }
table.probes td { border-top: 1px solid var(--rule); padding: 7px 14px; }
table.probes { background: var(--card); }
.probes .name { white-space: nowrap; font-weight: 600; width: 15em; }
.probes .word { white-space: nowrap; width: 7em; }
.probes .number { width: 5em; color: var(--soft); white-space: nowrap; }
.probes .why { color: var(--soft); font-size: 13px; }
.pass { color: var(--good); } .fail { color: var(--bad); font-weight: 600; }
.unsupported { color: var(--soft); }
</style>"""


def to_html(verdict: Verdict, *, machine: dict[str, Any] | None, total_s: float) -> str:
    """The page; `machine` holds facts of `backends.Machine`, None where it did not start."""
    body = "\n".join(_body(verdict, machine, total_s))
    title = f"{verdict.platform}: {verdict.verdict}"
    return PAGE.replace("{title}", html.escape(title)).replace("{body}", body)


def _body(verdict: Verdict, machine: dict[str, Any] | None, total_s: float) -> Iterator[str]:
    bad = " bad" if verdict.verdict == NOT_READY else ""
    name = html.escape(f"{verdict.platform}: {verdict.device_kind}")
    yield _STYLE
    yield f'<header><h1>{name} <span class="status{bad}">{verdict.verdict}</span></h1>'
    yield f"<p>{html.escape(verdict.platform_version or 'version not told')}</p></header>"
    versions = (machine or {}).get("versions", {"jax": verdict.jax})
    tiles = {
        "devices": str(machine["num_devices"]) if machine else "none",
        "probes": str(len(verdict.probes)),
        "examined in": f"{total_s:.0f} s",
        **versions,
    }
    yield '<div class="tiles">'
    for label, value in tiles.items():
        yield (
            f'<div class="tile"><div class="label">{html.escape(label)}</div>'
            f'<div class="value">{html.escape(value)}</div></div>'
        )
    yield "</div>"
    yield f"<p>Probes: {counts(verdict)}. Repairs: {', '.join(verdict.repairs) or 'none'}.</p>"
    if rows := consequences(verdict.probes):
        yield "<h2>What did not pass, and what follows</h2>"
        yield '<table class="probes">'
        for outcome, text in rows:
            told = f'{html.escape(outcome.message)}<div class="why">{html.escape(text)}</div>'
            yield _row(outcome, told)
        yield "</table>"
    for group, outcomes in itertools.groupby(verdict.probes, key=lambda o: probe(o.name).group):
        yield f'<h2>{html.escape(group)}</h2><table class="probes">'
        for outcome in outcomes:
            why = html.escape(probe(outcome.name).why)
            told = f'{html.escape(outcome.message)}<div class="why">{why}</div>'
            yield _row(outcome, told, timed=True)
        yield "</table>"


def _row(outcome: Outcome, told: str, *, timed: bool = False) -> str:
    time = f'<td class="number">{outcome.time_s:.1f} s</td>' if timed else ""
    return (
        f'<tr><td class="name">{outcome.name}</td>'
        f'<td class="word {outcome.status}">{outcome.status}</td>{time}<td>{told}</td></tr>'
    )
