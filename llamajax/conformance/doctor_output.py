"""The doctor's output: a line a probe while it runs, the verdict as text, and as an HTML page."""

import collections
import html
import itertools
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, TextIO

from llamajax.backends import PlatformVerdict, ProbeResult
from llamajax.backends.repairs import NOT_READY
from llamajax.conformance.probe_table import NOT_TRIED, consequences, probe
from llamajax.monitoring.report.static_page import static_page

_WIDTH = 100
_WORDS = {"pass": "pass", "fail": "FAIL", "unsupported": "unsupported"}


class LiveResults:
    """Shows each result as it comes; on a terminal also which probe is running."""

    def __init__(self, stream: TextIO = sys.stderr):
        self._stream = stream
        self._group = ""

    def begin(self, name: str) -> None:
        """Show that a probe begins."""
        if self._stream.isatty():
            print(f"  {name} ...", end="\r", file=self._stream, flush=True)

    def show(self, result: ProbeResult) -> None:
        """Show a result; those that were not tried are counted at the end alone."""
        if result.message.startswith(NOT_TRIED):
            return
        group = probe(result.name).group
        if group != self._group:
            self._group = group
            print(group, file=self._stream)
        head = f"{_name_and_word(result)}{result.time_s:6.1f} s  "
        text = textwrap.fill(
            result.message or "-",
            width=_WIDTH + len(head) // 2,
            initial_indent=head,
            subsequent_indent=" " * len(head),
            break_on_hyphens=False,
        )
        print(text, file=self._stream, flush=True)


def _name_and_word(result: ProbeResult) -> str:
    return f"  {result.name:<24}{_WORDS[result.status]:<12}"


def _counts(verdict: PlatformVerdict) -> str:
    """Return how many probes passed, failed and are unsupported."""
    found = collections.Counter(result.status for result in verdict.probes)
    return ", ".join(f"{found[status]} {status}" for status in _WORDS)


def text_lines(
    verdict: PlatformVerdict, *, num_devices: int | None, total_s: float, partial: bool
) -> Iterator[str]:
    """Yield lines: platform, verdict, what did not pass, options. partial: probes were left out."""
    if num_devices is None:
        yield f"platform: {verdict.platform}, which did not start"
    else:
        yield f"platform: {verdict.platform}, {num_devices} x {verdict.device_kind}"
    yield f"verdict: {verdict.verdict}{', as far as these probes go' * partial}"
    yield f"repairs: {', '.join(verdict.repairs) or 'none'}"
    yield f"probes: {_counts(verdict)}, in {total_s:.0f} s"
    for result, text in consequences(verdict.probes):
        yield f"{_name_and_word(result)}{text}"
    for result in verdict.probes:
        if result.name == "compiler_options" and result.status == "pass":
            yield f"compiler options: {result.message}"
    untried = [r for r in verdict.probes if r.message.startswith(NOT_TRIED)]
    if untried:
        yield f"  {len(untried)} more {untried[0].message}"


_STYLE = """
h2 { margin-top: 28px; }
table.probes { background: var(--card); border-collapse: collapse; width: 100%; }
table.probes td { border-top: 1px solid var(--rule); padding: 7px 14px; vertical-align: top; }
.probes .name { white-space: nowrap; font-weight: 600; width: 15em; }
.probes .word { white-space: nowrap; width: 7em; }
.probes .number { width: 5em; color: var(--soft); white-space: nowrap; }
.probes .why { color: var(--soft); font-size: 13px; }
.pass { color: var(--green); } .fail { color: var(--red); font-weight: 600; }
.unsupported { color: var(--soft); }"""


def to_html(verdict: PlatformVerdict, *, machine: dict[str, Any] | None, total_s: float) -> str:
    """Return the page; `machine` holds facts of `backends.Machine`, None where it did not start."""
    body = "\n".join(_body(verdict, machine, total_s))
    return static_page(f"{verdict.platform}: {verdict.verdict}", body, style=_STYLE)


def _body(
    verdict: PlatformVerdict, machine: dict[str, Any] | None, total_s: float
) -> Iterator[str]:
    kind = "bad" if verdict.verdict == NOT_READY else "good"
    name = html.escape(f"{verdict.platform}: {verdict.device_kind}")
    yield f'<header><h1>{name} <span class="pill {kind}">{verdict.verdict}</span></h1>'
    yield f"<p>{html.escape(verdict.platform_version or 'version unknown')}</p></header>"
    tiles = {
        "devices": str(machine["num_devices"]) if machine else "none",
        "probes": str(len(verdict.probes)),
        "examined in": f"{total_s:.0f} s",
        **(machine or {}).get("versions", {"jax": verdict.jax}),
    }
    yield '<div class="tiles">'
    for label, value in tiles.items():
        yield (
            f'<div class="card tile"><div class="label">{html.escape(label)}</div>'
            f'<div class="value">{html.escape(value)}</div></div>'
        )
    yield "</div>"
    yield f"<p>Probes: {_counts(verdict)}. Repairs: {', '.join(verdict.repairs) or 'none'}.</p>"
    if rows := consequences(verdict.probes):
        yield "<h2>What did not pass, and what follows</h2>"
        yield '<table class="probes">'
        yield from (_row(result, text) for result, text in rows)
        yield "</table>"
    for group, results in itertools.groupby(verdict.probes, key=lambda r: probe(r.name).group):
        yield f'<h2>{html.escape(group)}</h2><table class="probes">'
        yield from (_row(result, probe(result.name).why, timed=True) for result in results)
        yield "</table>"


def _row(result: ProbeResult, why: str, *, timed: bool = False) -> str:
    time = f'<td class="number">{result.time_s:.1f} s</td>' if timed else ""
    return (
        f'<tr><td class="name">{result.name}</td>'
        f'<td class="word {result.status}">{result.status}</td>{time}'
        f'<td>{html.escape(result.message)}<div class="why">{html.escape(why)}</div></td></tr>'
    )
