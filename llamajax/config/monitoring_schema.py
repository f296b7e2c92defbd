"""Config keys of what a run shows and records."""

import dataclasses
import re
from typing import Literal

from llamajax.config.values import key

SINKS = ("jsonl", "tensorboard", "wandb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitoringConfig:
    """What is shown and recorded besides metrics.jsonl."""

    sinks: tuple[str, ...] = key(
        "where rows go besides metrics.jsonl: tensorboard, wandb; jsonl: nowhere else",
        default=("tensorboard",),
    )
    progress: Literal["auto", "bar", "lines", "none"] = key(
        "bar: a live view, on a terminal; lines: in a log", default="auto"
    )
    profile_steps: str | None = key(
        "FIRST:LAST steps to trace to profile/ with a summary of where their time went; none: none",
        default=None,
    )
    norms_every: int | None = key(
        "steps between rows with the norms of weights, gradients and updates by layer group; none: "
        "never, and the step does not compute them",
        default=None,
        at_least=1,
    )
    dump_hlo: bool = key("whether to write the compiled step's program to profile/", default=False)


def parse_steps(text: str) -> tuple[int, int] | None:
    """Return first and last step of `20:25`; None where it is no such range from step 2 on."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 2 <= int(found[1]) <= int(found[2]):
        return None
    return int(found[1]), int(found[2])
