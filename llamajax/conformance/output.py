"""What the doctor prints: a line a probe while it runs, then the verdict and what follows."""

import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from llamajax.conformance.outcome import Outcome
from llamajax.conformance.table import probe
from llamajax.conformance.verdict import Verdict, blocks, repaired

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
        """A probe has ended."""
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
    machine: dict[str, Any] | None, outcomes: Sequence[Outcome], verdict: Verdict, *, total_s: float
) -> str:
    """Platform, verdict, and a line for everything that did not pass."""
    return "\n".join(_lines(machine, outcomes, verdict, total_s))


def _lines(
    machine: dict[str, Any] | None, outcomes: Sequence[Outcome], verdict: Verdict, total_s: float
) -> Iterator[str]:
    if machine is None:
        yield "platform: did not come up"
    else:
        yield (
            f"platform: {machine['platform']}, {machine['num_devices']} x {machine['device_kind']}"
        )
    yield f"verdict: {verdict.word}"
    counts = [
        f"{sum(o.status == s for o in outcomes)} {s}" for s in ("pass", "fail", "unsupported")
    ]
    yield f"probes: {', '.join(counts)}, in {total_s:.0f} s"
    for outcome, consequence in consequences(outcomes):
        yield f"  {outcome.name} ({outcome.status}): {consequence}"


def consequences(outcomes: Sequence[Outcome]) -> list[tuple[Outcome, str]]:
    """Everything that did not pass, what must be mended first, with what follows from it."""
    passed = {o.name for o in outcomes if o.status == "pass"}
    rows = []
    for outcome in outcomes:
        asked = probe(outcome.name)
        if outcome.status == "pass":
            continue
        if blocks(asked, outcome):
            rows.append((0, outcome, f"not ready: {asked.why}; {asked.otherwise}"))
        elif repaired(asked, outcome, passed=passed):
            rows.append((1, outcome, f"repaired: {asked.otherwise}"))
        else:
            rows.append((2, outcome, f"no matter: {asked.otherwise}"))
    return [(outcome, text) for _, outcome, text in sorted(rows, key=lambda row: row[0])]
