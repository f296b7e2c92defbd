"""The config keys of the data: `data.*`, and those of a stage in `data.stages`."""

import dataclasses
from typing import Literal

from llamajax.config.forms import check_prepared, check_validation
from llamajax.config.model_schema import RopeScaling
from llamajax.config.values import key

# JAX keys and grain shuffles are seeded with 32 bits.
SEED_LIMIT = 2**32


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataStage:
    """What a run changes at a step. A key that is none stays as it was in the stage before."""

    from_step: int | None = key("updates before the stage", default=None, at_least=1)
    from_tokens: int | None = key(
        "or tokens before it: it begins with the first update after so many. Count those of this "
        "config from step 0 on",
        default=None,
        at_least=1,
    )
    path: str | None = key("as data.path", default=None, is_path=True, check=check_prepared)
    weights: tuple[float, ...] | None = key(
        "as data.weights; none beside a `path`: by their numbers of tokens", default=None
    )
    seq_len: int | None = key("as data.seq_len", default=None, at_least=1)
    global_batch_size: int | None = key("as data.global_batch_size", default=None, at_least=1)
    accumulation_steps: int | None = key("as train.accumulation_steps", default=None, at_least=1)
    rope_scaling: RopeScaling | None = key("as model.rope_scaling", default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples are read, and in which order."""

    path: str = key(
        "directory written by `llamajax.prepare`; several, separated by commas, are mixed",
        is_path=True,
        check=check_prepared,
    )
    weights: tuple[float, ...] | None = key(
        "share of the samples drawn from each of several paths; none: by their numbers of tokens "
        "(rows of whole examples hold fewer tokens than samples of text)",
        default=None,
    )
    validation: dict[str, str] | None = key(
        "further validation sets, as NAME:DIR,NAME:DIR, each a directory written by `prepare`: its "
        "validation split, or all of it where it has none; none: the split of `path` alone",
        default=None,
        is_path=True,
        check=check_validation,
    )
    seq_len: int = key("T: tokens per sample; chosen here, not by `prepare`", at_least=1)
    global_batch_size: int = key(
        "samples per optimizer step, over all devices and accumulation steps", at_least=1
    )
    shuffle: bool = key(
        "whether samples are drawn in a random order, a new one each epoch", default=True
    )
    seed: int = key("seed of the order of the samples", at_least=0, below=SEED_LIMIT)
    mask_documents: bool = key(
        "whether attention and positions are separate for each document packed into one sample",
        default=True,
    )
    packing: Literal["auto", "examples", "windows"] = key(
        "how instructions become samples. examples: rows of whole examples with padding, filled "
        "evenly, or by best fit where it saves over 1 % of the rows; only those longer than a "
        "sample are cut. windows: of one stream, without padding, cut anywhere. auto: examples, "
        "but a run that has read instructions in windows goes on with them. Text is always cut "
        "into windows",
        default="auto",
    )
    num_threads: int = key("reader threads; changes speed only", default=2, at_least=1)
    prefetch_batches: int = key("batches read ahead; changes speed only", default=4, at_least=1)

    stages: tuple[DataStage, ...] = key(
        "what changes later in the run, in order (docs/data.md); on the command line as JSON: "
        """'[{"from_step": 1000, "seq_len": 8192}]'""",
        default=(),
    )

    @property
    def paths(self) -> list[str]:
        """The prepared directories that `path` names."""
        return [part.strip() for part in self.path.split(",") if part.strip()]
