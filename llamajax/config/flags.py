"""A flag of a verb that is not a config key, such as `--workdir`."""

import dataclasses
from typing import Any

from llamajax.config.values import describe

REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """`--name=METAVAR`; `annotation` is a type as in the schema: int, bool, Literal, `X | None`."""

    name: str
    doc: str
    annotation: Any = str
    default: Any = REQUIRED
    metavar: str = "VALUE"

    @property
    def usage(self) -> str:
        """The flag as the help shows it."""
        return f"--{self.name}" if self.annotation is bool else f"--{self.name}={self.metavar}"

    @property
    def type_words(self) -> str:
        """The type and the default as a user reads them."""
        if self.default is REQUIRED:
            return f"{describe(self.annotation)}; required"
        return f"{describe(self.annotation)}; default {show(self.default)}"


def show(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(show(item) for item in value)
    return '""' if value == "" else str(value)


WORKDIR = Flag(
    name="workdir",
    metavar="DIR",
    doc="directory of the run: config, metrics, checkpoints, report; rerun to continue from it",
)
BACKEND_FLAGS = (
    Flag(
        name="backend",
        metavar="NAME",
        annotation=str | None,
        default=None,
        doc="JAX platform: cpu, cuda, tpu, or a plugin's; none: what JAX finds",
    ),
    Flag(
        name="plugin",
        metavar="PATH.so",
        annotation=str | None,
        default=None,
        doc="bare PJRT plugin library that serves --backend",
    ),
    Flag(
        name="options",
        metavar="K=V,...",
        annotation=str | None,
        default=None,
        doc="options of that plugin",
    ),
)
