"""Bringing JAX up on the platform that was asked for, or saying clearly why it did not come up.

The only place that writes environment variables and JAX's configuration.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import tempfile
from typing import Any

import jax

from llamajax.backends.devices import give_gpu_memory
from llamajax.backends.place import Place, find_place, several_are_indicated
from llamajax.backends.rollcall import call_roll
from llamajax.config.schema import BackendConfig
from llamajax.errors import UserError

PLUGIN_VARIABLE = "LLAMAJAX_PJRT_PLUGIN"
# A process that stays silent so long is dead to the others; JAX's own 100 s waste a pod's time.
_HEARTBEAT_S = 20


@dataclasses.dataclass(frozen=True)
class Machine:
    """What came up: the facts that a run prints once and stores."""

    platform: str
    device_kind: str
    num_devices: int
    num_processes: int
    process_id: int
    compute_capability: str | None  # NVIDIA's, such as "9.0"
    versions: dict[str, str]

    @property
    def is_primary(self) -> bool:
        """Whether this process writes logs and metrics."""
        return self.process_id == 0


def start(config: BackendConfig) -> Machine:
    """The machine, with JAX started on it (and joined with the other processes, if there are any).

    Precedence: config keys, the variable LLAMAJAX_PJRT_PLUGIN=name:/path.so, JAX_PLATFORMS.
    Raises UserError when the backend that was asked for does not come up: never a silent run on
    the CPU.
    """
    config = _with_environment(config)
    give_gpu_memory()  # before JAX's CUDA plugin reads it; elsewhere it means nothing
    if config.num_cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", config.num_cpu_devices)
    if config.plugin:
        _register_plugin(config)
    if config.name:
        # The CPU stays available to the host side; being first, the wanted one must come up.
        names = (config.name,) if config.name == "cpu" else (config.name, "cpu")
        jax.config.update("jax_platforms", ",".join(names))
    place = find_place(config)
    scheduler = several_are_indicated() if place is None else None
    if place is not None and place.num_processes > 1:
        _join(place, timeout_s=config.timeout_s)
    elif scheduler:
        _join_as_detected(scheduler, timeout_s=config.timeout_s)
    try:
        devices = jax.devices()
    except RuntimeError as error:
        wanted = config.name or os.environ.get("JAX_PLATFORMS") or "the default"
        reason = str(error).splitlines()[0]
        raise UserError(
            f"backend {wanted!r} did not come up: {reason}. Install its JAX plugin, or choose "
            "another backend (cpu always works)"
        ) from None
    if place is not None and jax.process_count() != place.num_processes:
        raise UserError(
            f"{place.num_processes} processes were asked for, but {jax.process_count()} came: "
            f"platform {devices[0].platform!r} does not join processes"
        )
    return Machine(
        platform=devices[0].platform,
        device_kind=devices[0].device_kind,
        num_devices=len(devices),
        num_processes=jax.process_count(),
        process_id=jax.process_index(),
        compute_capability=getattr(devices[0], "compute_capability", None),
        versions={p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax", "optax")},
    )


def _with_environment(config: BackendConfig) -> BackendConfig:
    if os.environ.get("JAX_PLATFORMS") == "":
        del os.environ["JAX_PLATFORMS"]  # JAX would take it for a choice
    variable = os.environ.get(PLUGIN_VARIABLE)
    if config.name or config.plugin or not variable:
        return config
    name, colon, path = variable.partition(":")
    if not (name and colon and path):
        raise UserError(f"{PLUGIN_VARIABLE}={variable}: write it as NAME:/path/to/plugin.so")
    return dataclasses.replace(config, name=name, plugin=path)


def _register_plugin(config: BackendConfig) -> None:
    """Name a bare library to JAX by its documented variable, options in a JSON file beside it."""
    path = pathlib.Path(config.plugin).absolute()
    if not path.is_file():
        raise UserError(f"backend.plugin = {config.plugin}: there is no such file")
    options = {}
    for item in (config.options or "").split(",") if config.options else ():
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise UserError(f"backend.options: {item!r} is not NAME=VALUE")
        options[name] = int(value) if value.lstrip("-").isdigit() else value
    target = str(path)
    if options:
        file = tempfile.NamedTemporaryFile("w", suffix=".json", delete=False)  # noqa: SIM115
        with file:
            json.dump({"library_path": target, "create_options": options}, file)
        target = file.name
    os.environ["PJRT_NAMES_AND_LIBRARY_PATHS"] = f"{config.name}:{target}"


def _join(place: Place, *, timeout_s: int) -> None:
    """Join the processes of the run, after making sure that all of them are there."""
    call_roll(
        place.coordinator_address,
        num_processes=place.num_processes,
        process_id=place.process_id,
        timeout_s=timeout_s,
    )
    try:
        jax.distributed.initialize(
            coordinator_address=place.coordinator_address,
            num_processes=place.num_processes,
            process_id=place.process_id,
            local_device_ids=place.local_device_ids,
            cluster_detection_method="deactivate",  # a launcher's workers are no scheduler's tasks
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {place.process_id} of {place.num_processes} could not join the coordinator "
            f"{place.coordinator_address}: {str(error).splitlines()[0]}"
        ) from None


def _join_as_detected(scheduler: str, *, timeout_s: int) -> None:
    """Let JAX ask the scheduler for coordinator, number and rank."""
    try:
        jax.distributed.initialize(
            initialization_timeout=timeout_s, heartbeat_timeout_seconds=_HEARTBEAT_S
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{scheduler} started several processes, but JAX could not join them: "
            f"{str(error).splitlines()[0]}. Set backend.coordinator_address, num_processes and "
            "process_id, or start them with llamajax.launch"
        ) from None


def program_bytes(compiled: Any) -> int | None:
    """Memory of one device that a compiled program asks for; None where the backend is silent."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + kept


def peak_memory_bytes() -> int | None:
    """Most memory that one local device has used so far; None where the backend does not tell."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks) if peaks else None
