"""Open prepared directories as one mixture, with the endless order of its samples.

Text is cut into windows, instructions are packed by whole examples (`packing.py`). An *id* names a
sample of the mixture: directories one after the other, each with as many ids as samples of this
length. The order of ids is a function of (seed, index): a new permutation for each epoch of each
directory, mixed by grain over directories that repeat without end.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llamajax.backends.jax_private.bare_grain import grain
from llamajax.config.schema import DataConfig
from llamajax.data.packing import WINDOWS, ExampleRows, Windows, cut_shares
from llamajax.data.prepared_split import PreparedSplit, digest, open_split, read_manifest
from llamajax.data.sample_order import ROUNDS, EndlessOrder
from llamajax.errors import UserError, combine


class Sample(NamedTuple):
    """A sample of a source. pieces: first token in its stream and size of each, (pieces, 2)."""

    source: PreparedSplit
    number: int
    pieces: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """One split of one or several prepared directories, as a config describes them."""

    sources: tuple[PreparedSplit, ...]
    weights: tuple[float, ...]
    seed: int
    shuffle: bool
    mask_documents: bool
    # What was made so far, by what it is made of.
    _samples: dict = dataclasses.field(default_factory=dict, init=False)
    _orders: dict = dataclasses.field(default_factory=dict, init=False)

    @functools.cached_property
    def hash(self) -> str:
        """Identity of what is read and in which order, apart from the sequence length."""
        data = [s.fingerprint for s in self.sources]
        return digest([data, self.weights, self.seed, self.shuffle])

    def describe(self) -> str:
        """Describe what is read of each source, for people and for comparison."""
        return " + ".join(
            f"{source.stats['documents']:,} documents, {source.num_tokens:,} tokens, weight "
            f"{weight:.4g}, fingerprint {source.fingerprint[:12]}"
            for source, weight in zip(self.sources, self.weights, strict=True)
        )

    @property
    def tokenizer_fingerprint(self) -> str:
        """Identity of the one tokenizer of all sources."""
        return self.manifests[0]["tokenizer"]["fingerprint"]

    @property
    def manifests(self) -> tuple[dict[str, Any], ...]:
        """The manifest of each source."""
        return tuple(s.manifest for s in self.sources)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sources."""
        return sum(s.num_tokens for s in self.sources)

    @property
    def unigram_loss(self) -> float | None:
        """Return the validation loss of token frequencies, nats per token; None for a train split.

        It is the mean of -log p. p is a token's frequency in the train split of its source.
        """
        losses = [s.stats.get("unigram_loss") for s in self.sources]
        if None in losses:
            return None
        counts = [s.num_loss_tokens for s in self.sources]
        return sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)

    @property
    def masked(self) -> bool:
        """Whether any source is instruction data."""
        return any(source.masked for source in self.sources)

    def samples(self, seq_len: int, packing: str) -> list[Windows | ExampleRows]:
        """Return how the stream of each source becomes samples of training."""
        if (seq_len, packing) not in self._samples:
            found = [source.samples(seq_len, packing, self._key(source)) for source in self.sources]
            self._samples[seq_len, packing] = found
        return self._samples[seq_len, packing]

    def packing_facts(self, seq_len: int, packing: str) -> dict[str, Any]:
        """Return what becomes of the examples in samples of this length; empty without examples.

        efficiency: share of the positions that hold tokens. cut_examples_share: of the examples,
        those of which a sample holds only a part; cut_loss_share: of the tokens that carry loss,
        those of these examples.
        """
        if not self.masked:
            return {}
        examples = [source.examples for source in self.sources if source.masked]
        samples = zip(self.weights, self.samples(seq_len, packing), strict=True)
        return {
            "packing": packing,
            "efficiency": sum(weight * each.efficiency for weight, each in samples),
        } | cut_shares(examples, seq_len, packing)

    def _key(self, source: PreparedSplit) -> str | None:
        return digest([self.seed, source.fingerprint]) if self.shuffle else None

    def locate(self, sample_id: int, seq_len: int, packing: str) -> Sample:
        """Return the sample of an id."""
        for source, samples in zip(self.sources, self.samples(seq_len, packing), strict=True):
            if sample_id < samples.count:
                return Sample(source, sample_id, samples.pieces(sample_id))
            sample_id -= samples.count
        raise IndexError("sample id beyond the last of this mixture")

    def order(
        self, seq_len: int, packing: str, rounds: int = ROUNDS, starts: tuple[int, ...] = ()
    ) -> EndlessOrder | grain.MapDataset:
        """Return the endless sequence of sample ids of this length: `order[i]` is the i-th.

        starts: samples of each source to pass by, as in `Segment`.
        """
        of = (seq_len, packing, rounds, starts)
        if of not in self._orders:
            self._orders[of] = self._make_order(*of)
        return self._orders[of]

    def counts(self, num_samples: int) -> list[int]:
        """Return how many of the first samples of an order are of each source, as grain mixes."""
        # Its proportions are whole numbers, the smallest 100 (grain 0.2.18); each source takes its
        # share of what the sources before it have left, rounded up.
        shares = [int(weight * (100 / min(self.weights))) for weight in self.weights]
        found, left, all_shares = [], num_samples, sum(shares)
        for share in shares:
            rest = left * (all_shares - share) // all_shares
            found.append(left - rest)
            left, all_shares = rest, all_shares - share
        return found

    def _make_order(
        self, seq_len: int, packing: str, rounds: int, starts: tuple[int, ...]
    ) -> EndlessOrder | grain.MapDataset:
        parts, first, counts = [], 0, [s.count for s in self.samples(seq_len, packing)]
        starts = starts or (0,) * len(counts)
        for source, count, start in zip(self.sources, counts, starts, strict=True):
            if count == 0:
                raise UserError(_too_short(source, seq_len))
            key = self._key(source)
            parts.append(EndlessOrder(first, count, key=key, rounds=rounds, start=start))
            first += count
        if len(parts) == 1:
            return parts[0]
        # grain's mix ends with its shortest member: these have no end. It keeps weights to 1 %.
        mixed = grain.MapDataset.mix([grain.MapDataset.source(p) for p in parts], self.weights)
        mixed[0]  # the first access sets up state, which two threads must not do at once
        return mixed


def has_split(data: DataConfig, split: str) -> bool:
    """Return whether any of the paths was prepared with tokens in this split."""
    return bool(_with_split([Path(path) for path in data.paths], split))


def _with_split(paths: list[Path], split: str) -> list[Path]:
    return [p for p in paths if read_manifest(p)["splits"].get(split, {}).get("tokens")]


def open_mixture(data: DataConfig, *, split: str, vocab_size: int, verify: bool = False) -> Mixture:
    """Open the mixture that `data` describes. For validation: of the paths that have that split.

    Checks format, completeness, sizes of the shards, that all have one tokenizer whose vocabulary
    is within the model's `vocab_size`, and at least one sample in each source. verify: also read
    every shard once and compare its checksum. Raises UserError.
    """
    paths = [Path(path) for path in data.paths]
    if not paths:
        raise UserError("data.path is empty; name a directory written by llamajax.prepare")
    if len({p.resolve() for p in paths}) < len(paths):
        raise UserError(f"data.path names a directory twice: {data.path}; use data.weights instead")
    kept = (_with_split(paths, split) if split == "validation" else None) or paths
    sources = tuple(open_split(p, split, verify=verify) for p in kept)
    problems = [p for source in sources if (p := source.tokenizer_problem(sources[0]))]
    for source in sources:
        if (size := source.manifest["tokenizer"]["vocab_size"]) > vocab_size:
            problems.append(
                f"{source.path} has tokens up to {size - 1}, but"
                f" model.vocab_size = {vocab_size}: set it to at least {size}"
            )
        by_examples = source.masked and data.packing != WINDOWS
        if split == "train" and not by_examples and source.num_tokens <= data.seq_len:
            problems.append(_too_short(source, data.seq_len))
    weights = tuple(s.num_tokens for s in sources)
    if data.weights and len(data.weights) != len(paths):
        count = len(data.weights)
        problems.append(f"data.weights has {count} values for {len(paths)} paths in data.path")
    elif data.weights:
        given = dict(zip(paths, data.weights, strict=True))
        weights = tuple(given[s.path] for s in sources)
        if not all(math.isfinite(w) and w > 0 for w in weights):
            problems.append(
                f"data.weights = {weights}: every weight must be above 0; drop the path instead"
            )
    if problems:
        raise combine(problems, title=f"the data cannot be used (data.path = {data.path}):")
    shares = tuple(w / math.fsum(weights) for w in weights)
    return Mixture(sources, shares, data.seed, data.shuffle, data.mask_documents)


def open_validation_sets(data: DataConfig, trained: Mixture) -> dict[str, Mixture]:
    """Open the directories of `data.validation`, by name.

    trained: the mixture that the run trains on. Raises one UserError with all problems.
    """
    found, problems = {}, []
    for name, path in (data.validation or {}).items():
        try:
            found[name] = _open_validation_set(Path(path), trained)
        except UserError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise combine(problems, title="these sets of data.validation cannot be used:")
    return found


def _open_validation_set(path: Path, trained: Mixture) -> Mixture:
    """Open the validation split of a directory, or its train split where it has no other."""
    splits = read_manifest(path, label="")["splits"]
    split = "validation" if splits.get("validation", {}).get("tokens") else "train"
    source = open_split(path, split, verify=False)
    if problem := source.tokenizer_problem(trained.sources[0]):
        raise UserError(problem)
    if source.num_tokens < 2 or not source.num_loss_tokens:
        raise UserError(f"{path}: its {split} split has no token to predict")
    return dataclasses.replace(trained, sources=(source,), weights=(1.0,))


def _too_short(source: PreparedSplit, seq_len: int) -> str:
    return (
        f"{source.path} has {source.num_tokens} {source.split} tokens, fewer than one sample:"
        f" data.seq_len = {seq_len}, plus 1; use a smaller one"
    )
