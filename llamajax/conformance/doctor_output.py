"""What the doctor prints: a line a probe while it runs, then the verdict and what follows."""

import collections
import html
import itertools
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from llamajax.backends import PlatformVerdict
from llamajax.backends import ProbeResult as Outcome
from llamajax.backends.stored_verdict import NOT_READY
from llamajax.conformance.probe_table import NOT_TRIED, consequence, probe
from llamajax.monitoring.report.page import PAGE

_NAME, _STATUS = 24, 12
_WIDTH = 100
_MARKS = {"pass": "pass", "fail": "FAIL", "unsupported": "unsupported"}


class Live:
    """Shows each outcome as it comes; on a terminal also what is being tried."""

    def __init__(self, stream: TextIO = sys.stderr):
        self._stream = stream
        self._terminal = stream.isatty()
        self._group = ""

    def begin(self, name: str) -> None:
        """A probe begins."""
        if self._terminal:
            print(f"  {name} ...", end="\r", file=self._stream, flush=True)

    def show(self, outcome: Outcome) -> None:
        """A probe has ended; one that was not tried is counted at the end alone."""
        if outcome.message.startswith(NOT_TRIED):
            return
        group = probe(outcome.name).group
        if group != self._group:
            self._group = group
            print(f"{group}", file=self._stream)
        print(line(outcome), file=self._stream, flush=True)


def line(outcome: Outcome) -> str:
    """One outcome: name, status, time, and the message beside and below."""
    head = f"  {outcome.name:<{_NAME}}{_MARKS[outcome.status]:<{_STATUS}}{outcome.time_s:6.1f} s  "
    indent = " " * len(head)
    return textwrap.fill(
        outcome.message or "-",
        width=_WIDTH + len(indent) // 2,
        initial_indent=head,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


def to_text(
    verdict: PlatformVerdict, *, num_devices: int | None, total_s: float, partial: bool
) -> str:
    """Platform, verdict, and a line for everything that did not pass; partial: of some probes."""
    return "\n".join(_lines(verdict, num_devices, total_s, partial))


def _lines(
    verdict: PlatformVerdict, num_devices: int | None, total_s: float, partial: bool
) -> Iterator[str]:
    if num_devices is None:
        yield f"platform: {verdict.platform}, which did not start"
    else:
        yield f"platform: {verdict.platform}, {num_devices} x {verdict.device_kind}"
    yield f"verdict: {verdict.verdict}{', as far as these probes go' * partial}"
    yield f"repairs: {', '.join(verdict.repairs) or 'none'}"
    yield f"probes: {counts(verdict)}, in {total_s:.0f} s"
    for outcome, text in consequences(verdict.probes):
        yield f"  {outcome.name:<{_NAME}}{_MARKS[outcome.status]:<{_STATUS}}{text}"
    untried = [o for o in verdict.probes if o.message.startswith(NOT_TRIED)]
    if untried:
        yield f"  {len(untried)} more {untried[0].message}"


def counts(verdict: PlatformVerdict) -> str:
    """How many probes came out how."""
    found = collections.Counter(outcome.status for outcome in verdict.probes)
    return ", ".join(f"{found[status]} {status}" for status in _MARKS)


def consequences(outcomes: Sequence[Outcome]) -> list[tuple[Outcome, str]]:
    """Everything that did not pass with what follows from it; what must be mended comes first."""
    tried = [o for o in outcomes if not o.message.startswith(NOT_TRIED)]
    passed = {o.name for o in tried if o.status == "pass"}
    rows = [(consequence(o, passed=passed), o) for o in tried if o.status != "pass"]
    return [(o, text) for (_, text), o in sorted(rows, key=lambda row: row[0][0])]


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


def to_html(verdict: PlatformVerdict, *, machine: dict[str, Any] | None, total_s: float) -> str:
    """The page; `machine` holds facts of `backends.Machine`, None where it did not start."""
    body = "\n".join(_body(verdict, machine, total_s))
    title = f"{verdict.platform}: {verdict.verdict}"
    return PAGE.replace("{title}", html.escape(title)).replace("{body}", body)


def _body(
    verdict: PlatformVerdict, machine: dict[str, Any] | None, total_s: float
) -> Iterator[str]:
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
