"""The rows of a run as columns for the page: few enough to mail, with every extreme kept."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

CELLS = 110_000  # numbers of all columns of a page; each takes about 10 bytes
_MEANS = 1000
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
_FOLLOW = {"mfu_full", "mfu_causal", "step_time_s", "learning_rate"}
_MAX_COLUMNS = 40


def is_number(value: Any) -> bool:
    """Return whether a value of a row is a number, finite or not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def significant(value: Any) -> float | None:
    """Return a number with 7 digits, all that a float32 has; None for what is not finite."""
    if not is_number(value) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.7g}")


def column_names(rows: Iterable[Row]) -> list[str]:
    """Return the numeric keys of training rows, known ones first."""
    found = {k for row in rows for k, v in row.items() if is_number(v) or k == "memory_bytes"}
    others = sorted(found - set(_KNOWN) - _NO_CURVES)
    return [*(key for key in _KNOWN if key in found), *others][:_MAX_COLUMNS]


def _value(row: Row, key: str) -> Any:
    value = row.get(key)
    return max(value, default=None) if isinstance(value, list) else value  # of all devices


def thin(rows: Sequence[Row], names: Sequence[str], *, limit: int) -> list[Row]:
    """Return at most about `limit` rows: first and last ones, and each bucket's extremes.

    Rows whose update was skipped, or with a value that is not finite, are extremes as well.
    """
    if len(rows) <= limit:
        return list(rows)
    extremes = [name for name in names if name not in _FOLLOW]
    buckets = max(1, limit // (2 * len(extremes) + 2))
    size = math.ceil(len(rows) / buckets)
    kept = {0, len(rows) - 1}
    for start in range(0, len(rows), size):
        indices = range(start, min(start + size, len(rows)))
        odd = (i for i in indices if "update_skipped" in rows[i])
        kept.update([start, *list(odd)[:1]])
        for name in extremes:
            values = [(_value(rows[i], name), i) for i in indices]
            finite = [pair for pair in values if is_number(pair[0]) and math.isfinite(pair[0])]
            broken = [i for value, i in values if is_number(value) and not math.isfinite(value)]
            kept.update(broken[:1])
            if finite:
                kept.update((min(finite)[1], max(finite)[1]))
    return [rows[i] for i in sorted(kept)]


def columns(rows: Sequence[Row], names: Sequence[str], *, first_s: float) -> dict[str, list]:
    """Return the values of rows by name; `time_s` counts from `first_s`."""
    found: dict[str, list] = {"step": [row["step"] for row in rows]}
    found["time_s"] = [_since(row, first_s) for row in rows]
    for name in ("tokens_seen", *names):
        found[name] = [significant(_value(row, name)) for row in rows]
    return found


def _since(row: Row, first_s: float) -> float | None:
    return round(row["time_s"] - first_s, 2) if is_number(row.get("time_s")) else None


def means(rows: Sequence[Row], names: Sequence[str], *, first_s: float) -> dict[str, list]:
    """Return columns of means over equal parts of the rows: what a smoothed curve is made from."""
    size = math.ceil(len(rows) / _MEANS)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    found = columns([part[len(part) // 2] for part in parts], [], first_s=first_s)
    for name in names:
        found[name] = [_mean(_value(row, name) for row in part) for part in parts]
    return found


def _mean(values: Iterable[Any]) -> float | None:
    finite = [value for value in values if is_number(value) and math.isfinite(value)]
    return significant(sum(finite) / len(finite)) if finite else None


def curves(rows: Sequence[Row], *, first_s: float, cells: int = CELLS) -> dict[str, Any]:
    """Return the curves of a run.

    train: columns of training rows. means: the same of parts of all rows, where train is thinned.
    evaluations: by name of a validation set ("" for the only one), columns with `loss`.
    nonfinite: [[step, key], ...] of the first hundred. rows: how many there are in all.
    """
    train = [row for row in rows if "loss" in row]
    names = column_names(train)
    kept = thin(train, names, limit=cells // (len(names) + 3))
    tokens = {row["step"]: row.get("tokens_seen") for row in train}
    broken = [
        [row["step"], key]
        for row in rows
        for key, value in row.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    return {
        "rows": len(train),
        "train": columns(kept, names, first_s=first_s),
        "means": means(train, names, first_s=first_s) if len(kept) < len(train) else None,
        "evaluations": {
            name: columns(thin(found, ["loss"], limit=2000), ["loss"], first_s=first_s)
            for name, found in _evaluations(rows, tokens).items()
        },
        "nonfinite": broken[:100],
    }


def _evaluations(rows: Sequence[Row], tokens: Mapping[int, Any]) -> dict[str, list[Row]]:
    """Return evaluation rows by validation set: `eval_loss` or `eval_loss/NAME` in a row."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        for key, value in row.items():
            if key.split("/")[0] == "eval_loss" and is_number(value):
                name = key.partition("/")[2]
                entry = {"step": row["step"], "loss": value, "time_s": row.get("time_s")}
                entry["tokens_seen"] = tokens.get(row["step"])
                found.setdefault(name, []).append(entry)
    return found
