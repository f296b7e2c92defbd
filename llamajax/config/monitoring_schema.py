"""Config keys of what a run shows and records."""

import dataclasses
from typing import Literal

from llamajax.config.forms import among, parse_steps
from llamajax.config.values import key

SINKS = ("jsonl", "tensorboard", "wandb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitoringConfig:
    """What is shown and recorded besides metrics.jsonl."""

    sinks: tuple[str, ...] = key(
        "where rows go besides metrics.jsonl: tensorboard, wandb; jsonl: nowhere else",
        default=("tensorboard",),
        check=among(SINKS),
    )
    progress: Literal["auto", "bar", "lines", "none"] = key(
        "bar: a live view, on a terminal; lines: in a log", default="auto"
    )
    profile_steps: str | None = key(
        "FIRST:LAST steps to trace to profile/ with a summary of where their time went; none: none",
        default=None,
        check=parse_steps,
    )
    norms_every: int | None = key(
        "steps between rows with the norms of weights, gradients and updates by layer group; none: "
        "never, and the step does not compute them",
        default=None,
        at_least=1,
    )
    dump_hlo: bool = key("whether to write the compiled step's program to profile/", default=False)
