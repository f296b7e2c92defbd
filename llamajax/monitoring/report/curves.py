"""The rows of a run as columns for the page: few enough to mail, with every extreme kept."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]

CELLS = 110_000  # numbers of all columns of a page; each takes about 10 bytes
_MEANS, _MAX_EVALUATIONS = 1000, 2000
_AXES = ("step", "time_s", "tokens_seen")
# Known columns in the order of the page; other numbers of a row follow.
_KNOWN = (
    "loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu_full", "mfu_causal", "step_time_s",
    "data_wait_s", "memory_bytes",
)  # fmt: skip
_NO_CURVES = {
    "step", "time_s", "tokens_seen", "peak_memory_bytes", "update_skipped", "first_sample",
    "batch_size", "seed",
}  # fmt: skip
# The extremes of these are those of another one.
_FOLLOW = {*_AXES, "mfu_full", "mfu_causal", "step_time_s", "learning_rate"}
_MAX_COLUMNS = 40
# Keys of evaluation rows that are shown.
_EVALUATED = re.compile(r"eval_loss|eval_bits_per_byte|ema_loss|task/.*/accuracy$")


def is_number(value: Any) -> bool:
    """Return whether a value of a row is a number, finite or not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers(rows: Sequence[Row], name: str) -> np.ndarray:
    """Return the values of one key as float64; NaN for what is missing or no number."""
    values = [row.get(name) for row in rows]
    if any(isinstance(value, list) for value in values):  # of all devices
        values = [max(v, default=None) if isinstance(v, list) else v for v in values]
    return np.array([value if is_number(value) else math.nan for value in values], np.float64)


def _column_names(rows: Iterable[Row]) -> list[str]:
    """Return the keys of training rows that are drawn, known ones first."""
    found: set[str] = set()
    for row in rows:
        new = row.keys() - found
        found.update(key for key in new if is_number(row[key]) or isinstance(row[key], list))
    others = sorted(found - set(_KNOWN) - _NO_CURVES)
    return [*(key for key in _KNOWN if key in found), *others][:_MAX_COLUMNS]


def thin(table: Mapping[str, np.ndarray], odd: Iterable[int], *, limit: int) -> np.ndarray:
    """Return the indices of about `limit` rows: first and last ones, and each bucket's extremes.

    table: columns. odd: further indices, of which each bucket keeps the first.
    """
    length = len(table["step"])
    if length <= limit:
        return np.arange(length)
    extremes = [table[name] for name in table if name not in _FOLLOW]
    buckets = max(1, limit // (2 * len(extremes) + 2))
    starts = np.arange(0, length, math.ceil(length / buckets))
    kept = [starts, [length - 1]]
    for values in extremes:
        for fill, best in ((math.inf, np.argmin), (-math.inf, np.argmax)):
            filled = np.where(np.isfinite(values), values, fill)
            parts = np.split(filled, starts[1:])
            kept.append(starts + [best(part) for part in parts])
    odd = np.unique(np.fromiter(odd, np.int64))
    _, first = np.unique(np.searchsorted(starts, odd, side="right"), return_index=True)
    return np.unique(np.concatenate([*kept, odd[first]]).astype(np.int64))


def _significant(values: np.ndarray) -> list[float | int | None]:
    """Return numbers with 7 digits, all that a float32 has; whole ones exactly, NaN as None."""
    return [
        None if not math.isfinite(v) else int(v) if v.is_integer() else float(f"{v:.7g}")
        for v in values.tolist()
    ]


def columns(table: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, list]:
    """Return the values of these rows by name."""
    return {name: _significant(values[rows]) for name, values in table.items()}


def _means(table: Mapping[str, np.ndarray]) -> dict[str, list]:
    """Return columns of means over equal parts of the rows: what a smoothed curve is made from."""
    length = len(table["step"])
    starts = np.arange(0, length, math.ceil(length / _MEANS))
    middle = (starts + np.append(starts[1:], length)) // 2
    found = {}
    for name, values in table.items():
        finite = np.isfinite(values)
        sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
        counts = np.add.reduceat(finite.astype(np.float64), starts)
        means = np.divide(sums, counts, out=np.full(len(starts), math.nan), where=counts > 0)
        found[name] = _significant(values[middle] if name in _AXES else means)
    return found


def _table(rows: Sequence[Row], names: Iterable[str], first_s: float) -> dict[str, np.ndarray]:
    table = {name: numbers(rows, name) for name in (*_AXES, *names)}
    table["time_s"] = np.round(table["time_s"] - first_s, 2)
    return table


def curves(rows: Sequence[Row], *, first_s: float, cells: int = CELLS) -> dict[str, Any]:
    """Return the curves of a run.

    train: columns of training rows. means: the same of parts of all rows, where train is thinned.
    evaluations: by each drawn key of evaluation rows, its column and those of the axes.
    nonfinite: [[step, key], ...] of the first hundred. nonfinite_rows: how many there are.
    """
    train = [row for row in rows if "loss" in row]
    broken = [
        (row["step"], key)
        for row in rows
        for key, value in row.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    table = _table(train, _column_names(train), first_s)
    steps = {step for step, _ in broken}
    odd = [i for i, row in enumerate(train) if "update_skipped" in row or row["step"] in steps]
    kept = thin(table, odd, limit=cells // len(table))
    return {
        "train": columns(table, kept),
        "means": _means(table) if len(kept) < len(train) else None,
        "evaluations": _evaluations(rows, table, first_s),
        "nonfinite": broken[:100],
        "nonfinite_rows": len(steps),
    }


def _evaluations(
    rows: Sequence[Row], train: Mapping[str, np.ndarray], first_s: float
) -> dict[str, dict[str, list]]:
    """Return the drawn keys of evaluation rows by name: held-out losses, and figures of tasks.

    train: columns of the training rows, between which the tokens of other steps are on a line.
    """
    known = np.isfinite(train["tokens_seen"])
    by_key: dict[str, list[Row]] = {}
    for row in rows:
        for key in row if "loss" not in row else ():
            if _EVALUATED.match(key):
                by_key.setdefault(key, []).append(row)
    found = {}
    for key, points in sorted(by_key.items()):
        table = _table(points, [key], first_s)
        if known.any():
            line = train["step"][known], train["tokens_seen"][known]
            tokens = np.interp(table["step"], *line, left=math.nan, right=math.nan)
            table["tokens_seen"] = np.round(tokens)
        found[key] = columns(table, thin(table, (), limit=_MAX_EVALUATIONS))
    return found
