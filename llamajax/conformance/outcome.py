"""What a probe works with, and its two ways of saying no; what it says is a `backends.Probe`."""

import dataclasses
from pathlib import Path
from typing import Any


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
