"""What a probe says, and the two ways in which it says no."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

Status = Literal["pass", "fail", "unsupported"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one probe; time_s is wall time, compilation included."""

    name: str
    status: Status
    message: str
    time_s: float


class UnsupportedError(Exception):
    """The backend says that it cannot do this; or there is nothing to try it on."""


class WrongError(Exception):
    """The backend did it, and the result is wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What a probe works with. devices: all of the backend's; folder: to write into, removed."""

    devices: list[Any]
    machine: Any  # backends.Machine
    folder: Path
