"""The verdict on a replayed step (hardware, numerics, data, unremarkable), in words and as JSON.

The questions are asked in the order of what they presuppose: a computation that does not repeat
says nothing about numbers, and numbers that are not finite say nothing about the data's loss.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llamajax import data
from llamajax.errors import listed
from llamajax.monitoring.row_comparison import TOLERANCES
from llamajax.optim.guard import REASONS
from llamajax.replaying.document_losses import DocumentLosses, DocumentPart
from llamajax.replaying.step_probe import GradientSummary

# A document stands out with twice the loss a token of the median one, over at least so many
# targets: shorter ones differ by more.
_STANDS_OUT = 2.0
_LEAST_TOKENS = 16
_first_of = functools.partial(listed, most=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordComparison:
    """What the run recorded of the step, and how closely a replay must agree with it.

    row: loss, gradient norm and why the update was skipped; None: not on record. same_machine:
    whether bits must be the same. dtype: of the computation, for the tolerance elsewhere.
    first_difference: the first step on the way that was not as recorded, in words.
    """

    row: Mapping[str, Any] | None
    same_machine: bool
    dtype: str
    first_difference: str | None

    @property
    def tolerance(self) -> float:
        """Relative difference that another machine may cause."""
        return TOLERANCES[self.dtype]

    def agrees(self, gradient: GradientSummary) -> bool | None:
        """Return whether the replay's numbers are those on record; None without a record."""
        if self.row is None:
            return None
        pairs = [(self.row[name], getattr(gradient, name)) for name in ("loss", "grad_norm")]
        return all(
            same_number(a, b)
            or (not self.same_machine and math.isclose(a, b, rel_tol=self.tolerance))
            for a, b in pairs
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that was found about a step.

    base: the checkpoint it was computed from, None: the beginning. sample_ids: by row of the batch.
    gradient, repeats: of the first computation, and whether a second gave the same bits. weights:
    what was not finite before the step. first_nonfinite: an activation and the rows where it is
    not finite. That and `documents` are None on a mesh where they cannot be computed.
    """

    step: int
    base: str | None
    sample_ids: list[int]
    gradient: GradientSummary
    repeats: bool
    record: RecordComparison
    weights: Mapping[str, np.ndarray]
    first_nonfinite: tuple[str, list[int]] | None
    documents: DocumentLosses | None
    tokenizer: data.Tokenizer

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are finite."""
        return math.isfinite(self.gradient.loss) and math.isfinite(self.gradient.grad_norm)

    @property
    def nonfinite_gradients(self) -> list[str]:
        """Names of the weights whose gradients are not finite."""
        return [name for name, rows in self.gradient.nonfinite.items() if rows.any()]

    def verdict(self) -> tuple[str, str]:
        """Return hardware, numerics, data or unremarkable; and why."""
        if not self.repeats:
            return "hardware", (
                "two computations of the same gradient on this machine differ: a faulty device, or "
                "a kernel that is not deterministic"
            )
        if self.record.same_machine and self.record.agrees(self.gradient) is False:
            return "hardware", (
                "the result repeats, but is not what the run had on record on this kind of "
                "machine: a device was wrong then, or is now"
            )
        if not self.finite:
            return "numerics", self._why_not_finite()
        parts, median = self.documents or ((), 0.0)
        long = [part for part in parts if part.num_targets >= _LEAST_TOKENS]
        if out := [part for part in long if part.loss > _STANDS_OUT * median]:
            return "data", (
                f"{len(out)} of the documents stand out: {out[0].loss:.3g} nats per token over "
                f"{out[0].num_targets} tokens, where the batch's median is {median:.3g}"
            )
        skipped = (self.record.row or {}).get("update_skipped", REASONS[0])
        if skipped != REASONS[0]:
            return "data", f"{skipped} beyond what the run allows: it is the batch, and it repeats"
        return "unremarkable", "finite, repeats bit by bit, and no document stands out"

    def _why_not_finite(self) -> str:
        if self.weights:
            names = ", ".join(map(self._weight_words, self.weights))
            rows = f"; set off by samples {self._samples()}" if self.first_nonfinite else ""
            return f"weights are not finite before the step: {names}{rows}"
        if self.first_nonfinite is None:
            return "the forward pass is finite and the gradient is not"
        where = "; compare with" if self.record.dtype != "float32" else " in"
        return (
            f"all weights are finite, and {self.first_nonfinite[0]} is not, in samples "
            f"{self._samples()}: an overflow{where} train.dtype=float32"
        )

    def _samples(self) -> str:
        return _first_of([self.sample_ids[row] for row in self.first_nonfinite[1]])

    def _weight_words(self, name: str) -> str:
        rows = np.flatnonzero(self.weights[name]).tolist()
        if name not in ("embedding", "head"):
            kind = "layers" if name.startswith("blocks/") else "places"
            return f"{name} ({kind} {_first_of(rows)})"
        size = self.tokenizer.vocab_size
        words = [f"{row} {self.tokenizer.decode([row])!r}" if row < size else row for row in rows]
        return f"{name} (tokens {_first_of(words)})"

    def lines(self) -> list[str]:
        """Return the lines that people read."""
        word, why = self.verdict()
        agrees, gradient = self.record.agrees(self.gradient), self.gradient
        recorded = {None: "not on record", True: "as recorded", False: "NOT as recorded"}[agrees]
        bits = "bit by bit" if self.record.same_machine else f"within {self.record.tolerance:g}"
        found = [
            f"step     {self.step}, from {self.base or 'the beginning'}",
            f"loss     {gradient.loss!r}, gradient norm {gradient.grad_norm!r}; {recorded}"
            + (f" ({bits})" if agrees is not None else ""),
            f"repeats  {'bit by bit' if self.repeats else 'NO: two computations differ'}",
        ]
        if self.record.first_difference:
            found.append(f"before   {self.record.first_difference}")
        if not self.finite:
            found += self._nonfinite_lines()
        if self.documents is None:
            found.append(
                "documents were not looked at: the mesh has stages or parts of sequences; "
                "replay on one without, for example --mesh=fsdp=-1"
            )
        for part in self.documents.largest if self.documents else ():
            found.append(
                f"document sample {part.sample_id} (row {part.row}), from token "
                f"{part.first_token} of {part.source}: {part.loss:.3f} nats x "
                f"{part.num_targets}: {part.excerpt(self.tokenizer)!r}"
            )
        if self.documents and self.documents.largest:
            first = self.documents.largest[0]
            found.append(
                "show     the first of them: python -m llamajax.prepare "
                f"--inspect={first.source} --at={first.first_token}"
            )
        return [*found, f"verdict  {word}: {why}"]

    def _nonfinite_lines(self) -> list[str]:
        found = []
        if self.weights:
            words = ", ".join(map(self._weight_words, self.weights))
            found.append(f"weights  not finite before the step: {words}")
        if self.first_nonfinite is not None:
            found.append(f"first    {self.first_nonfinite[0]}, in samples {self._samples()}")
        if self.nonfinite_gradients:
            found.append(f"gradient not finite in {_first_of(self.nonfinite_gradients)}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the same as a JSON object; numbers that are not finite are strings."""
        word, why = self.verdict()
        odd, row = self.first_nonfinite, self.record.row
        return {
            "step": self.step,
            "checkpoint": self.base,
            "verdict": word,
            "reason": why,
            "loss": _plain(self.gradient.loss),
            "grad_norm": _plain(self.gradient.grad_norm),
            "recorded": row and {name: _plain(row[name]) for name in ("loss", "grad_norm")},
            "update_skipped": row and row["update_skipped"],
            "matches_record": self.record.agrees(self.gradient),
            "same_machine": self.record.same_machine,
            "repeats": self.repeats,
            "first_difference": self.record.first_difference,
            "first_nonfinite": odd
            and {"tensor": odd[0], "samples": [self.sample_ids[row] for row in odd[1]]},
            "nonfinite_weights": {
                name: np.flatnonzero(rows).tolist() for name, rows in self.weights.items()
            },
            "nonfinite_gradients": self.nonfinite_gradients,
            "sample_ids": self.sample_ids,
            "documents": self.documents and [*map(self._document, self.documents.largest)],
        }

    def _document(self, part: DocumentPart) -> dict[str, Any]:
        found = dataclasses.asdict(part) | {"text": part.excerpt(self.tokenizer)}
        return found | {name: _plain(found[name]) for name in ("loss", "excess")}


def same_number(a: float, b: float) -> bool:
    """Return whether two numbers are equal, or both NaN."""
    return a == b or (math.isnan(a) and math.isnan(b))


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
