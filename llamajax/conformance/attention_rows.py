"""Which attention `train.attention=auto` takes on a machine, by a run's own choice."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from llamajax.backends import Machine
from llamajax.config.schema import ComputeDtype
from llamajax.ops.attention import best_attention, falls_back

_HEAD_SIZE, _SEQ_LEN = 128, 4096  # of Llama2-7B


def attention_rows(machine: dict[str, Any], repairs: Sequence[str]) -> list[dict[str, Any]]:
    """Return the choice for each dtype, as JSON. machine: its facts."""
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
