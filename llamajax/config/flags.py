"""A flag of a verb that is not a config key, such as `--workdir`."""

import dataclasses
from types import SimpleNamespace
from typing import Any

from llamajax.config.schema import BackendConfig, ComputeDtype, MeshConfig
from llamajax.config.values import describe
from llamajax.errors import UserError

REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """`--name=METAVAR`; `annotation` is a type as in the schema: int, bool, Literal, `X | None`.

    `verbatim`: any text is a value, the empty one and `none` included.
    """

    name: str
    doc: str
    annotation: Any = str
    default: Any = REQUIRED
    metavar: str = "VALUE"
    verbatim: bool = False

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
CHECKPOINT = Flag(
    name="checkpoint",
    metavar="DIR",
    doc="weights: a --workdir of train, one of its checkpoints/STEP, a Hugging Face directory, a "
    "GGUF file, or a directory of Meta's",
)
DTYPE = Flag(
    name="dtype",
    metavar="NAME",
    annotation=ComputeDtype | None,
    default=None,
    doc="dtype of weights, computation and cache; none: bfloat16 on accelerators, float32 on cpu",
)
MESH = Flag(
    name="mesh",
    metavar="AXIS=SIZE,...",
    annotation=str | None,
    default=None,
    doc="devices along each mesh axis, for example fsdp=4,tensor=2; one size may be -1",
)
NUM_CPU_DEVICES = Flag(
    name="num_cpu_devices",
    metavar="N",
    annotation=int | None,
    default=None,
    doc="virtual devices of the cpu backend, to try a mesh without one",
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
MACHINE_FLAGS = (MESH, NUM_CPU_DEVICES, *BACKEND_FLAGS)


def mesh_config(text: str | None, *, rest: str) -> MeshConfig:
    """The mesh that `fsdp=4,tensor=2` asks for; axis `rest` takes all devices where it is None.

    Raises UserError when it is not written like that, or splits over a reserved axis.
    """
    axes = [field.name for field in dataclasses.fields(MeshConfig)]
    sizes: dict[str, int] = {}
    for part in (text or f"{rest}=-1").split(","):
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if axis not in axes or not size.removeprefix("-").isdecimal() or axis in sizes:
            raise UserError(
                f"--mesh={text}: {part!r} is not AXIS=SIZE; write for example fsdp=4,tensor=2, "
                f"each of {', '.join(axes)} at most once, one size may be -1: all that are left"
            )
        sizes[axis] = int(size)
    if unused := [axis for axis in ("sequence", "stage") if sizes.get(axis, 1) != 1]:
        raise UserError(f"--mesh={text}: {unused[0]} must be 1; split over data, fsdp and tensor")
    return MeshConfig(**sizes)


def backend_config(flags: SimpleNamespace) -> BackendConfig:
    """What MACHINE_FLAGS say of the machine, as the section of a run's config.

    Raises UserError for a plugin or options without the platform that they serve.
    """
    for name in ("plugin", "options"):
        if getattr(flags, name) is not None and flags.backend is None:
            raise UserError(f"--{name} needs --backend, the plugin's platform")
    return BackendConfig(
        name=flags.backend,
        plugin=flags.plugin,
        options=flags.options,
        num_cpu_devices=flags.num_cpu_devices,
    )
