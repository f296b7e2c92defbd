"""From the outcomes of all probes to one word, and to what llamajax will do about each failure."""

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from typing import Any

from llamajax.backends import Probe as Outcome
from llamajax.backends import Verdict
from llamajax.backends.stored_verdict import NOT_READY, READY, READY_WITH_REPAIRS
from llamajax.conformance.table import PROBES, Probe, probe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """`word` is one of the three of a verdict.

    repairs: names in `backends.repairs` of what llamajax makes up for on this backend.
    """

    word: str
    repairs: tuple[str, ...]


def judge(outcomes: Sequence[Outcome]) -> Judgement:
    """The judgement on a backend whose probes came out like this, so far."""
    passed = {o.name for o in outcomes if o.status == "pass"}
    blocked = any(blocks(probe(o.name), o) for o in outcomes)
    repairs = tuple(
        asked.repair for o in outcomes if makes_repair(asked := probe(o.name), o, passed=passed)
    )
    word = NOT_READY if blocked else READY_WITH_REPAIRS if repairs else READY
    return Judgement(word=word, repairs=repairs)


def blocks(asked: Probe, outcome: Outcome) -> bool:
    """Whether this outcome alone makes a backend not ready."""
    if asked.needed == "always":
        return outcome.status != "pass"
    return asked.needed == "if_there" and outcome.status == "fail"


def makes_repair(asked: Probe, outcome: Outcome, *, passed: set[str]) -> bool:
    """Whether this outcome says that a repair is to be made, one that was seen to work."""
    if asked.repair is None:
        return False
    if asked.instead_of is not None:
        return outcome.status == "pass"
    return outcome.status != "pass" and (asked.by is None or asked.by in passed)


def consequence(outcome: Outcome, *, passed: set[str]) -> tuple[int, str]:
    """What follows from an outcome that is no pass, after how much it matters: 0 is the most."""
    asked = probe(outcome.name)
    if blocks(asked, outcome):
        return 0, f"not ready: {asked.why}; {asked.otherwise}"
    if makes_repair(asked, outcome, passed=passed):
        return 1, f"repaired: {asked.otherwise}"
    instead = [p for p in PROBES if p.instead_of == outcome.name and p.name in passed]
    if instead:
        return 1, f"repaired: {instead[0].repair}, see {instead[0].name}"
    return 2, asked.otherwise


def verdict_on(
    machine: dict[str, Any] | None, outcomes: Sequence[Outcome], *, asked_for: str | None
) -> Verdict:
    """What is kept of an examination. machine: facts of `backends.Machine`; None: it did not start.

    asked_for: the platform's name in the command, if any.
    """
    judgement = judge(outcomes)
    facts = machine or {"platform": asked_for or "unknown", "device_kind": "unknown"}
    return Verdict(
        platform=facts["platform"],
        platform_version=facts.get("platform_version", ""),
        device_kind=facts["device_kind"],
        jax=importlib.metadata.version("jax"),
        verdict=judgement.word,
        repairs=judgement.repairs,
        probes=tuple(outcomes),
    )
