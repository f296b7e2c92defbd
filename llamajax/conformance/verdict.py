"""From the outcomes of all probes to one word, and to what llamajax will do about each failure."""

import dataclasses
from collections.abc import Sequence

from llamajax.conformance.outcome import Outcome
from llamajax.conformance.table import Probe, probe

READY = "ready"
REPAIRED = "ready with repairs"
NOT_READY = "not ready"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """`word` is READY, REPAIRED or NOT_READY; blockers: names of the probes that made it so."""

    word: str
    repairs: tuple[str, ...]
    blockers: tuple[str, ...]


def judge(outcomes: Sequence[Outcome]) -> Verdict:
    """The verdict on a backend whose probes came out like this."""
    passed = {o.name for o in outcomes if o.status == "pass"}
    blockers, repairs = [], []
    for outcome in outcomes:
        asked = probe(outcome.name)
        if blocks(asked, outcome):
            blockers.append(outcome.name)
        elif repaired(asked, outcome, passed=passed):
            repairs.append(asked.repair)
    word = NOT_READY if blockers else REPAIRED if repairs else READY
    return Verdict(word=word, repairs=tuple(repairs), blockers=tuple(blockers))


def blocks(asked: Probe, outcome: Outcome) -> bool:
    """Whether this outcome alone makes a backend not ready."""
    if asked.needed == "always":
        return outcome.status != "pass"
    return asked.needed == "if_there" and outcome.status == "fail"


def repaired(asked: Probe, outcome: Outcome, *, passed: set[str]) -> bool:
    """Whether something that was seen to work takes the place of what did not pass."""
    if asked.repair is None or outcome.status == "pass":
        return False
    return asked.by is None or asked.by in passed
