"""Flags that several verbs take. A verb declares its own as a dataclass derived from `Flags`."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from llamajax.config.schema import BackendConfig, ComputeDtype, MeshConfig, RunConfig
from llamajax.config.values import key
from llamajax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What a command line gives: a field declared with `key` is the flag `--NAME=METAVAR`.

    A field named like a Python keyword ends in an underscore that the flag has not. A field
    `command` takes what stands after `--`.
    """

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the values together, beyond the type and range of each one."""
        yield from ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags(Flags):
    """Flags of a verb that takes a run: also `--config.SECTION.KEY=VALUE` for every config key."""

    config: RunConfig = key(
        "Python file whose get_config() or get_config(ARG) returns the config; or a name that "
        "`llamajax configs` lists",
        metavar="FILE.py[:ARG]",
        is_path=True,
    )
    config_file: str = ""  # as given
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by path, as given


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFlags(RunFlags):
    """Flags of `train`."""

    workdir: str = key(
        "directory of the run: config, metrics, checkpoints, report; rerun to continue from it",
        metavar="DIR",
        is_path=True,
    )
    dry_run: bool = key(
        "print every value and where it is from, parameters, memory by formula, epochs and "
        "kernels; compile and write nothing",
        default=False,
    )


def _as_in(section: type, name: str, *, metavar: str) -> Any:
    """Declare a flag as the key `name` of a section of the config is declared."""
    field = section.__dataclass_fields__[name]
    return key(**field.metadata, default=field.default, metavar=metavar)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackendFlags(Flags):
    """Flags that choose a backend."""

    num_cpu_devices: int | None = _as_in(BackendConfig, "num_cpu_devices", metavar="N")
    backend: str | None = _as_in(BackendConfig, "name", metavar="NAME")
    plugin: str | None = _as_in(BackendConfig, "plugin", metavar="PATH.so")
    options: str | None = _as_in(BackendConfig, "options", metavar="K=V,...")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        for name in ("plugin", "options"):
            if getattr(self, name) is not None and self.backend is None:
                yield f"--{name} needs --backend, the plugin's platform"

    @property
    def backend_config(self) -> BackendConfig:
        """The backend as the section of a run's config."""
        return BackendConfig(
            name=self.backend,
            plugin=self.plugin,
            options=self.options,
            num_cpu_devices=self.num_cpu_devices,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineFlags(BackendFlags):
    """Flags that choose a backend, and a mesh of its devices."""

    mesh: str | None = key(
        "devices along each mesh axis, for example fsdp=4,tensor=2; one size may be -1",
        metavar="AXIS=SIZE,...",
        default=None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsFlags(MachineFlags):
    """Flags of a verb that computes with weights."""

    checkpoint: str = key(
        "weights: a --workdir of train, one of its checkpoints/STEP, a Hugging Face directory, a "
        "GGUF file, or a directory of Meta's",
        metavar="DIR",
        is_path=True,
    )
    dtype: ComputeDtype | None = key(
        "dtype of weights, computation and cache; none: bfloat16 on accelerators, float32 on cpu",
        metavar="NAME",
        default=None,
    )


def mesh_config(text: str) -> MeshConfig:
    """Return the mesh of `fsdp=4,tensor=2`.

    Raises:
        UserError: the text is not of this form, or splits over another axis than the three.
    """
    axes = [field.name for field in dataclasses.fields(MeshConfig)]
    sizes: dict[str, int] = {}
    for part in text.split(","):
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
