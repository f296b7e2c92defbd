"""What the doctor prints: a line a probe while it runs, then the verdict and what follows."""

import collections
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TextIO

from llamajax.backends import Probe as Outcome
from llamajax.backends import Verdict
from llamajax.conformance.table import NOT_TRIED, probe
from llamajax.conformance.verdict import consequence

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


def to_text(verdict: Verdict, *, num_devices: int | None, total_s: float, partial: bool) -> str:
    """Platform, verdict, and a line for everything that did not pass; partial: of some probes."""
    return "\n".join(_lines(verdict, num_devices, total_s, partial))


def _lines(
    verdict: Verdict, num_devices: int | None, total_s: float, partial: bool
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


def counts(verdict: Verdict) -> str:
    """How many probes came out how."""
    found = collections.Counter(outcome.status for outcome in verdict.probes)
    return ", ".join(f"{found[status]} {status}" for status in _MARKS)


def consequences(outcomes: Sequence[Outcome]) -> list[tuple[Outcome, str]]:
    """Everything that did not pass with what follows from it; what must be mended comes first."""
    tried = [o for o in outcomes if not o.message.startswith(NOT_TRIED)]
    passed = {o.name for o in tried if o.status == "pass"}
    rows = [(consequence(o, passed=passed), o) for o in tried if o.status != "pass"]
    return [(o, text) for (_, text), o in sorted(rows, key=lambda row: row[0][0])]
