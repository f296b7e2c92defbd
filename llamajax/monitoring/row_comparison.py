"""Compare what two runs logged, bit by bit or within a tolerance."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from llamajax.monitoring.metrics import MEASURED, load_metrics

# Sums in another order: allowed relative differences on another mesh. Rounding of the products
# dominates in bfloat16 (8 bits); in float32 the order of sums over a batch does.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2, "float8": 5e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """One value that differs most; relative: |a - b| / max(|a|, |b|), inf where one is missing."""

    relative: float
    what: str


def logged_values(workdir: Path) -> dict[tuple[int, str], Any]:
    """Return all that a run logged apart from times, by step and name."""
    return {
        (row["step"], name): value
        for row in load_metrics(workdir)
        for name, value in row.items()
        if name != "step" and name not in MEASURED
    }


def largest_difference(theirs: dict[tuple[int, str], Any], ours: dict) -> Difference | None:
    """Return the value that differs most between two runs; None where all are the same bitwise."""
    found = []
    for step, name in sorted(theirs.keys() | ours.keys()):
        a, b = theirs.get((step, name)), ours.get((step, name))
        if repr(a) != repr(b):
            what = f"{name} of step {step}: {a} and {b}"
            found.append(Difference(relative=_relative(a, b), what=what))
    return max(found, key=lambda d: d.relative, default=None)


def _relative(a: Any, b: Any) -> float:
    if not isinstance(a, int | float) or not isinstance(b, int | float):
        return math.inf
    difference = abs(a - b) / max(abs(a), abs(b), 1e-300)
    return math.inf if math.isnan(difference) else difference
