"""The doctor's output: results as they come, the verdict as text and page, attention."""

import collections
import html
import itertools
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, TextIO, get_args

from llamajax.backends import Machine, PlatformVerdict, ProbeResult
from llamajax.backends.repairs import NOT_READY
from llamajax.config.schema import ComputeDtype
from llamajax.conformance.probe_table import NOT_TRIED, consequences, probe
from llamajax.monitoring.report.html_page import html_page
from llamajax.ops.attention import best_attention, falls_back

_WIDTH = 100
_WORDS = {"pass": "pass", "fail": "FAIL", "unsupported": "unsupported"}
_HEAD_SIZE, _SEQ_LEN = 128, 4096  # of Llama2-7B


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
    verdict: PlatformVerdict, *, machine: dict[str, Any] | None, total_s: float, partial: bool
) -> Iterator[str]:
    """Yield lines: platform, verdict, what did not pass, options.

    machine: facts of `backends.Machine`; None: it did not start. partial: probes were left out.
    """
    if machine is None:
        yield f"platform: {verdict.platform}, which did not start"
    else:
        yield f"platform: {verdict.platform}, {machine['num_devices']} x {verdict.device_kind}"
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


def attention_rows(machine: dict[str, Any], repairs: Sequence[str]) -> list[dict[str, Any]]:
    """Return what `train.attention=auto` takes for each dtype, as JSON. machine: its facts."""
    examined, rows = Machine(**machine | {"repairs": tuple(repairs)}), []
    for dtype in get_args(ComputeDtype):
        choice = best_attention(examined, dtype, _HEAD_SIZE, _SEQ_LEN)
        rows.append({
            "dtype": dtype,
            "head_size": _HEAD_SIZE,
            "seq_len": _SEQ_LEN,
            "attention": choice.impl,
            "attention_reason": choice.reason,
            "is_second_best": choice.is_second_best,
            "falls_back": falls_back(choice.impl),
        })  # fmt: skip
    return rows


def attention_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each choice, with its dtypes."""
    same = ("attention", "attention_reason", "falls_back")
    for found, group in itertools.groupby(rows, lambda row: tuple(row[name] for name in same)):
        (impl, reason, instead), dtypes = found, ", ".join(row["dtype"] for row in group)
        yield f"attention: {impl} in {dtypes}: {reason}; {instead}"


_STYLE = """
pre { white-space: pre-wrap; }
table.probes { background: var(--card); border-collapse: collapse; width: 100%; }
table.probes td { border-top: 1px solid var(--rule); padding: 7px 14px; vertical-align: top; }
.probes .name { white-space: nowrap; font-weight: 600; }
.probes .why { color: var(--soft); font-size: 13px; }
.pass { color: var(--green); } .fail { color: var(--red); font-weight: 600; }
.unsupported { color: var(--soft); }"""


def to_html(
    verdict: PlatformVerdict, lines: Sequence[str], *, machine: dict[str, Any] | None
) -> str:
    """Return the page: versions, what the terminal shows (`lines`), and every probe.

    machine: facts of `backends.Machine`; None: it did not start.
    """
    versions = {"jax": verdict.jax} if machine is None else machine["versions"]
    body = "\n".join(_body(verdict, lines, versions))
    return html_page(f"{verdict.platform}: {verdict.verdict}", body, style=_STYLE)


def _body(
    verdict: PlatformVerdict, lines: Sequence[str], versions: dict[str, str]
) -> Iterator[str]:
    kind = "bad" if verdict.verdict == NOT_READY else "good"
    name = html.escape(f"{verdict.platform}: {verdict.device_kind}")
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    version = html.escape(f"{verdict.platform_version or 'version unknown'}; {packages}")
    text = html.escape("\n".join(lines))
    yield f'<header><h1>{name} <span class="pill {kind}">{verdict.verdict}</span></h1>'
    yield f"<p>{version}</p></header><pre>{text}</pre>"
    for group, results in itertools.groupby(verdict.probes, key=lambda r: probe(r.name).group):
        yield f'<h2>{html.escape(group)}</h2><table class="probes">'
        for result in results:
            message, why = map(html.escape, (result.message, probe(result.name).why))
            yield (
                f'<tr><td class="name">{result.name}</td><td class="{result.status}">'
                f"{result.status}</td><td>{result.time_s:.1f} s</td>"
                f'<td>{message}<div class="why">{why}</div></td></tr>'
            )
        yield "</table>"
