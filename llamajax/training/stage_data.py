"""What each stage of a run reads: how often, how it is packed, and what is odd about it."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from llamajax import data
from llamajax.data.packing import WINDOWS
from llamajax.monitoring.row_format import format_count
from llamajax.training.setup import Setup

_MANY_PASSES = 100  # over the same text
_FULL = 0.9  # of the positions hold tokens


@dataclasses.dataclass(frozen=True)
class StageData:
    """What a stage reads, of `steps` updates. packing: of its instructions, if it has any."""

    number: int
    stage: Setup
    first_step: int
    steps: int
    packing: str

    @property
    def tokens(self) -> int:
        """Tokens of its updates, padding included."""
        c = self.stage.config.data
        return self.steps * c.global_batch_size * c.seq_len

    @functools.cached_property
    def stream_tokens(self) -> list[float]:
        """Tokens that it reads of each source's stream, padding not included."""
        length, mixture = self.stage.config.data.seq_len, self.stage.mixture
        samples, total = mixture.samples(length, self.packing), sum(mixture.weights)
        return [
            each.tokens(self.tokens / length * weight / total)
            for each, weight in zip(samples, mixture.weights, strict=True)
        ]

    @functools.cached_property
    def packing_facts(self) -> dict[str, Any]:
        """What becomes of its instructions; empty where it has none."""
        return self.stage.mixture.packing_facts(self.stage.config.data.seq_len, self.packing)

    @property
    def packing_problem(self) -> str | None:
        """Words on rows of whole examples that are padding for a good part; None for other rows."""
        length, sources = self.stage.config.data.seq_len, self.stage.mixture.sources
        efficiency = self.packing_facts.get("efficiency", 1.0)
        if efficiency >= _FULL:
            return None
        found = [source.stats.get("packing", {}) for source in sources if source.masked]
        shares = {n: min(each.get(n, {}).get("efficiency", 0) for each in found) for n in found[0]}
        fuller = [n for n, share in shares.items() if int(n) > length and share >= _FULL]
        larger = f"data.seq_len = {fuller[0]} ({shares[fuller[0]]:.1%}) or " if fuller else ""
        return (
            f"only {efficiency:.1%} of the positions hold tokens, the others are padding that "
            f"costs as much: few examples fit together into data.seq_len = {length}. Choose "
            f"{larger}data.packing=windows, which has no padding and cuts examples"
        )

    def lines(self) -> Iterator[str]:
        """Yield the lines of a run's header that describe it."""
        c, facts = self.stage.config, self.packing_facts
        where = (
            f"stage {self.number}  from step {self.first_step} on: " if self.number else "data     "
        )
        tokens, rope = c.data.global_batch_size * c.data.seq_len, c.model.rope_scaling
        shape = f"{c.data.global_batch_size} x {c.data.seq_len} = {format_count(tokens)} tokens"
        scaled = f"; rope_scaling {rope.type} x {rope.factor:g}" if rope and self.number else ""
        yield f"{where}{c.data.path}; {shape} a step{scaled}"
        epochs = ", ".join(
            f"{tokens / source.num_tokens:.3g} of {source.path} "
            f"({format_count(source.num_tokens)} tokens)"
            for source, tokens in zip(self.stage.mixture.sources, self.stream_tokens, strict=True)
        )
        yield f"epochs   {epochs}; {format_count(self.tokens)} tokens in {self.steps} steps"
        if not facts:
            return
        cut = f"{facts['cut_examples_share']:.1%} of the examples"
        cut += f", with {facts['cut_loss_share']:.1%} of the tokens that carry loss,"
        if self.packing == WINDOWS:
            fix = "(data.packing=examples: the longest)"
            yield f"packing  windows of one stream; {cut} are cut {fix}"
            return
        yield f"packing  whole examples; {facts['efficiency']:.1%} of the positions hold tokens"
        if facts["cut_examples_share"]:
            yield (
                f"warning: {cut} are longer than data.seq_len = {c.data.seq_len} and cut: a part "
                "does not see those before it, and parts without such tokens are left out"
            )
        if problem := self.packing_problem:
            yield f"warning: {problem}"

    def reads_often(self) -> Iterator[str]:
        """Yield a warning where it reads its data very often."""
        mixture = self.stage.mixture
        passes = sum(self.stream_tokens) / mixture.num_tokens
        if passes >= _MANY_PASSES:
            reader, path = "train.steps", "data.path"
            if self.number:
                paths = ", ".join(str(source.path) for source in mixture.sources)
                reader, path = f"data.stages[{self.number - 1}]", f"its path, {paths},"
            text = format_count(mixture.num_tokens)
            yield f"{reader} reads the {text} tokens of {path} {passes:,.0f} times"


def stage_data(setup: Setup, position: "data.Position", start: int) -> list[StageData]:
    """Return what each stage of a run reads. position: in the data, from step `start` on.

    A stage that is over is described as it read last.
    """
    ends, found = [*setup.borders, setup.config.train.steps], []
    for number, ((first, stage), end) in enumerate(zip(setup.stages, ends, strict=True)):
        packing = position.segment(max(first, min(start, end - 1))).packing
        found.append(StageData(number, stage, first, end - first, packing))
    return found


def data_warnings(setup: Setup, stages: list[StageData]) -> Iterator[str]:
    """Yield what is odd about the data for this run."""
    c, mixture = setup.config, setup.mixture
    for each in stages:
        yield from each.reads_often()
    known = mixture.manifests[0]["tokenizer"]["vocab_size"]
    if c.model.vocab_size > 4 * known:
        yield (
            f"model.vocab_size = {c.model.vocab_size:,}, but the tokenizer of data.path has only "
            f"{known:,} tokens: most of the embedding is never used"
        )
    own = setup.evaluated.own
    used = own.sources if own else mixture.sources
    if left := {s.path for s in mixture.sources} - {s.path for s in used}:
        names = ", ".join(sorted(map(str, left)))
        yield f"evaluation leaves out {names}: prepared without a validation split"
    trained = {s.fingerprint for each in stages for s in each.stage.mixture.sources}
    for name, held_out in setup.evaluated.named.items():
        if trained & {s.fingerprint for s in held_out.sources}:
            yield f"data.validation: {name} is what the run trains on, not held out"
