"""What a replayed step means: the hardware, the numerics, the data, or nothing; in words and JSON.

The order of the questions is that of what they presuppose: a computation that does not repeat says
nothing of numbers, and numbers that are not finite say nothing of the data's loss.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llamajax import data
from llamajax.optim.guard import REASONS
from llamajax.replaying.documents import Piece
from llamajax.replaying.step_probe import GradientSummary

# A piece of a document stands out with twice the nats a token of the median piece, over so many
# tokens: short ones differ by more.
_STANDS_OUT = 2.0
_LEAST_TOKENS = 16
_LISTED_ROWS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that was found about a step.

    recorded: loss and gradient norm on record; earlier: the first step on the way that was not as
    recorded; weights: what was not finite before the step; first_nonfinite: an activation and the
    rows where it is; both of them and `pieces` are None where the mesh does not let one look.
    """

    step: int
    base: str | None
    sample_ids: list[int]  # by row of the batch
    first: GradientSummary
    second: GradientSummary
    recorded: Mapping[str, Any] | None
    same_machine: bool
    tolerance: float
    earlier: str | None
    weights: Mapping[str, np.ndarray]
    first_nonfinite: tuple[str, list[int]] | None
    pieces: list[Piece] | None
    median: float  # loss a token, of all pieces
    tokenizer: data.Tokenizer
    dtype: str

    @property
    def repeats(self) -> bool:
        """Whether both computations gave the same bits."""
        one, other = self.first, self.second
        scalars = [(one.loss, other.loss), (one.grad_norm, other.grad_norm)]
        return one.bits == other.bits and all(_same(a, b) for a, b in scalars)

    @property
    def matches_record(self) -> bool | None:
        """Whether the numbers are those on record, bit by bit on the same machine; None: none."""
        if self.recorded is None:
            return None
        pairs = [(self.recorded[n], getattr(self.first, n)) for n in ("loss", "grad_norm")]
        if self.same_machine:
            return all(_same(a, b) for a, b in pairs)
        close = lambda a, b: math.isclose(a, b, rel_tol=self.tolerance)  # noqa: E731
        return all(_same(a, b) or close(a, b) for a, b in pairs)

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are."""
        return math.isfinite(self.first.loss) and math.isfinite(self.first.grad_norm)

    def verdict(self) -> tuple[str, str]:
        """hardware, numerics, data or unremarkable; and why."""
        if not self.repeats:
            return "hardware", (
                "two computations of the same gradient on this machine differ: a faulty device, or "
                "a kernel that is not deterministic"
            )
        if self.matches_record is False and self.same_machine:
            return "hardware", (
                "the result repeats, but is not what the run had on record on this kind of "
                "machine: a device was wrong then, or is now"
            )
        if not self.finite:
            return "numerics", self._why_not_finite()
        if out := [piece for piece in self.pieces or () if self._stands_out(piece)]:
            return "data", (
                f"{len(out)} of the documents stand out: {out[0].loss:.3g} nats a token over "
                f"{out[0].num_targets} tokens, where the batch's median is {self.median:.3g}"
            )
        skipped = (self.recorded or {}).get("update_skipped", REASONS[0])
        if skipped != REASONS[0]:
            return "data", f"{skipped} beyond what the run allows: it is the batch, and it repeats"
        return "unremarkable", "finite, repeats bit by bit, and no document stands out"

    def _stands_out(self, piece: Piece) -> bool:
        return piece.num_targets >= _LEAST_TOKENS and piece.loss > _STANDS_OUT * self.median

    def _why_not_finite(self) -> str:
        if self.weights:
            names = ", ".join(map(self._weight_words, self.weights))
            rows = f"; set off by samples {self._samples()}" if self.first_nonfinite else ""
            return f"weights are not finite before the step: {names}{rows}"
        if self.first_nonfinite is None:
            return "the forward pass is finite and the gradient is not"
        name = self.first_nonfinite[0]
        return (
            f"all weights are finite, and {name} is not, in samples {self._samples()}: "
            + ("an overflow; compare with " if self.dtype != "float32" else "an overflow in ")
            + "train.dtype=float32"
        )

    def _samples(self) -> str:
        rows = self.first_nonfinite[1]
        return _some([self.sample_ids[row] for row in rows])

    def _weight_words(self, name: str) -> str:
        rows = np.flatnonzero(self.weights[name]).tolist()
        if name not in ("embedding", "head"):
            kind = "layers" if name.startswith("blocks/") else "places"
            return f"{name} ({kind} {_some(rows)})"
        size = self.tokenizer.vocab_size
        words = [f"{row} {self.tokenizer.decode([row])!r}" if row < size else row for row in rows]
        return f"{name} (tokens {_some(words)})"

    def lines(self) -> list[str]:
        """What a person reads."""
        word, why = self.verdict()
        record = {None: "not on record", True: "as recorded", False: "NOT as recorded"}
        bits = "bit by bit" if self.same_machine else f"within {self.tolerance:g}"
        found = [
            f"step     {self.step}, from {self.base or 'the beginning'}",
            f"loss     {self.first.loss!r}, gradient norm {self.first.grad_norm!r}; "
            f"{record[self.matches_record]}"
            + (f" ({bits})" if self.matches_record is not None else ""),
            f"repeats  {'bit by bit' if self.repeats else 'NO: two computations differ'}",
        ]
        if self.earlier:
            found.append(f"before   {self.earlier}")
        if not self.finite:
            found += self._nonfinite_lines()
        for piece in self.pieces or ():
            found.append(
                f"document sample {piece.sample_id} (row {piece.row}), from token "
                f"{piece.first_token} of {piece.source}: {piece.loss:.3f} nats x "
                f"{piece.num_targets}: {piece.excerpt(self.tokenizer)!r}"
            )
        if self.pieces is None:
            found.append(
                "documents were not looked at: the mesh has stages or parts of sequences; "
                "replay on one without, for example --mesh=fsdp=-1"
            )
        return [*found, f"verdict  {word}: {why}"]

    def _nonfinite_lines(self) -> list[str]:
        found = []
        if self.weights:
            words = ", ".join(map(self._weight_words, self.weights))
            found.append(f"weights  not finite before the step: {words}")
        if self.first_nonfinite is not None:
            found.append(f"first    {self.first_nonfinite[0]}, in samples {self._samples()}")
        if odd := self.gradients:
            found.append(f"gradient not finite in {_some(odd)}")
        return found

    @property
    def gradients(self) -> list[str]:
        """Names of the weights whose gradients are not finite."""
        return [name for name, rows in self.first.nonfinite.items() if rows.any()]

    def to_json(self) -> dict[str, Any]:
        """The same for a program; numbers that are not finite as strings."""
        word, why = self.verdict()
        odd = self.first_nonfinite
        return {
            "step": self.step,
            "checkpoint": self.base,
            "verdict": word,
            "reason": why,
            "loss": _plain(self.first.loss),
            "grad_norm": _plain(self.first.grad_norm),
            "recorded": self.recorded
            and {name: _plain(self.recorded[name]) for name in ("loss", "grad_norm")},
            "update_skipped": self.recorded and self.recorded["update_skipped"],
            "matches_record": self.matches_record,
            "same_machine": self.same_machine,
            "repeats": self.repeats,
            "first_difference": self.earlier,
            "first_nonfinite": odd
            and {"tensor": odd[0], "samples": [self.sample_ids[row] for row in odd[1]]},
            "nonfinite_weights": {
                name: np.flatnonzero(rows).tolist() for name, rows in self.weights.items()
            },
            "nonfinite_gradients": self.gradients,
            "sample_ids": self.sample_ids,
            "documents": self.pieces and [self._document(piece) for piece in self.pieces],
        }

    def _document(self, piece: Piece) -> dict[str, Any]:
        found = dataclasses.asdict(piece) | {"text": piece.excerpt(self.tokenizer)}
        return found | {name: _plain(found[name]) for name in ("loss", "excess")}


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _some(items: list) -> str:
    more = len(items) - _LISTED_ROWS
    return ", ".join(map(str, items[:_LISTED_ROWS])) + (f" and {more} more" if more > 0 else "")
