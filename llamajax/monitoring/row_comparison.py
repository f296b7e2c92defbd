"""What two runs logged, side by side: bit by bit, or within a tolerance."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from llamajax.monitoring import load_metrics
from llamajax.monitoring.metrics import MEASURED

# Sums in another order: allowed relative differences on another mesh. Rounding of the products
# dominates in bfloat16 (8 bits); in float32 the order of sums over a batch does.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """One value that differs most; relative: |a - b| / max(|a|, |b|), inf where one is missing."""

    relative: float
    what: str


def logged_values(workdir: Path) -> dict[tuple[int, str], Any]:
    """All that a run logged apart from times, by step and name."""
    return {
        (row["step"], name): value
        for row in load_metrics(workdir)
        for name, value in row.items()
        if name != "step" and name not in MEASURED
    }


def largest_difference(theirs: dict[tuple[int, str], Any], ours: dict) -> Difference | None:
    """The value that differs most between two runs; None where all are the same bit by bit."""
    found = [
        Difference(
            relative=_relative(theirs.get(key), ours.get(key)),
            what=f"{key[1]} of step {key[0]}: {theirs.get(key)} and {ours.get(key)}",
        )
        for key in sorted(theirs.keys() | ours.keys())
        if not _same(theirs.get(key), ours.get(key))
    ]
    return max(found, key=lambda d: d.relative, default=None)


def _same(a: Any, b: Any) -> bool:
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or (type(a) is type(b) and a == b)


def _relative(a: Any, b: Any) -> float:
    numbers = (int, float)
    if not isinstance(a, numbers) or not isinstance(b, numbers):
        return math.inf
    difference = abs(a - b) / max(abs(a), abs(b), 1e-300)
    return math.inf if math.isnan(difference) else difference
