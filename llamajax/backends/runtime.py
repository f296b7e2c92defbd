"""Bringing JAX up on the platform that was asked for, or saying clearly why it did not come up.

The only place that writes environment variables and JAX's configuration.
"""

import dataclasses
import importlib.metadata
import math
import os
from collections.abc import Callable
from typing import Any

import jax

from llamajax.backends import compile_cache
from llamajax.backends.device_table import read_device_table
from llamajax.backends.devices import give_gpu_memory, use_table
from llamajax.backends.jax_private.experimental_warning import no_experimental_warning
from llamajax.backends.platforms import attention_preferences, is_host, platform_facts
from llamajax.backends.plugin import named_to_jax, why_not
from llamajax.backends.rank import Rank, detected_scheduler, find_rank
from llamajax.backends.repairs import (
    COMPILE_CACHE,
    PLAIN_ATTENTION,
    SYNCHRONOUS_CHECKPOINTS,
    advice,
    apply_to_lowering,
    chosen,
    is_donating,
)
from llamajax.backends.stored_verdict import read_verdict
from llamajax.config.schema import BackendConfig
from llamajax.errors import TransientError, UserError
from llamajax.processes import process_facts
from llamajax.processes.host_collectives import broadcast_from_first
from llamajax.processes.roll_call import call_roll

PLUGIN_VARIABLE = "LLAMAJAX_PJRT_PLUGIN"
# A process that stays silent so long is dead to the others; JAX's own 100 s waste a pod's time.
_HEARTBEAT_S = 20


@dataclasses.dataclass(frozen=True)
class Machine:
    """What came up: the facts that a run prints once and stores.

    platform: as JAX's devices say, but AMD's GPUs are "rocm". repairs: names from `repairs.py`, of
    what was made up for here. attention_preferences: implementations, best first. compile_cache:
    folder of compiled programs, None where they are not kept. note: what the user should know.
    """

    platform: str
    device_kind: str
    num_devices: int
    num_processes: int
    process_id: int
    compute_capability: str | None  # NVIDIA's, such as "9.0"
    versions: dict[str, str]
    platform_version: str = ""
    repairs: tuple[str, ...] = ()
    attention_preferences: tuple[str, ...] = ("blocked", "split", "xla")
    compile_cache: str | None = None
    note: str | None = None

    @property
    def is_primary(self) -> bool:
        """Whether this process writes logs and metrics."""
        return self.process_id == 0

    @property
    def donates(self) -> bool:
        """Whether the memory of donated arrays is used again."""
        return is_donating(self.platform, self.repairs)

    @property
    def saves_asynchronously(self) -> bool:
        """Whether a checkpoint may be copied off the devices while they compute."""
        return SYNCHRONOUS_CHECKPOINTS not in self.repairs


def start(
    config: BackendConfig,
    *,
    keep_programs: bool = False,
    facts: Callable[[], process_facts.Facts] = dict,
) -> Machine:
    """The machine, with JAX started on it (and joined with the other processes, if there are any).

    Precedence: config keys, the variable LLAMAJAX_PJRT_PLUGIN=name:/path.so, JAX_PLATFORMS.
    keep_programs: whether compiled programs are kept in `config.compile_cache`. facts: called where
    there are several processes, for what must be the same in all of them (`process_facts`). Raises
    UserError when it is not, and when the backend that was asked for does not come up: never a
    silent run on the CPU.
    """
    config = _with_environment(config)
    use_table(read_device_table(config.device_table) if config.device_table else ())
    give_gpu_memory()  # before JAX's CUDA plugin reads it; elsewhere it means nothing
    if config.num_cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", config.num_cpu_devices)
    if config.name:
        # The CPU stays available to the host side; being first, the wanted one must come up.
        names = (config.name,) if is_host(config.name) else (config.name, "cpu")
        jax.config.update("jax_platforms", ",".join(names))
    place = find_rank(config)
    scheduler = detected_scheduler() if place is None else None
    with named_to_jax(config):
        if place is not None and place.num_processes > 1:
            _join(place, timeout_s=config.timeout_s, facts=facts())
        elif scheduler:
            _join_as_detected(scheduler, timeout_s=config.timeout_s)
        devices = _devices(config)
    if place is not None and jax.process_count() != place.num_processes:
        raise UserError(
            f"{place.num_processes} processes were asked for, but {jax.process_count()} came: "
            f"platform {devices[0].platform!r} does not join processes"
        )
    if place is None and jax.process_count() > 1:
        process_facts.check_same(facts())
    return _with_repairs(_facts(devices), config, keep_programs=keep_programs)


def _devices(config: BackendConfig) -> list[jax.Device]:
    """The devices of the platform that was asked for; UserError when it does not come up."""
    try:
        with no_experimental_warning():
            devices = jax.devices()
    except RuntimeError as error:
        wanted = config.name or os.environ.get("JAX_PLATFORMS") or "the default"
        raise UserError(why_not(wanted, str(error), config)) from None
    # JAX 0.10.2 leaves cuda and rocm out where the host has no such device, and says nothing
    if config.name and is_host(devices[0].platform) and not is_host(config.name):
        raise UserError(why_not(config.name, f"{config.name} provides no devices", config))
    return devices


def _facts(devices: list[jax.Device]) -> Machine:
    first = devices[0]
    version = " ".join(str(first.client.platform_version).split())
    is_amd = first.platform == "gpu" and "rocm" in version.lower()
    return Machine(
        platform="rocm" if is_amd else first.platform,
        device_kind=first.device_kind,
        num_devices=len(devices),
        num_processes=jax.process_count(),
        process_id=jax.process_index(),
        compute_capability=None if is_amd else getattr(first, "compute_capability", None),
        versions={p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax", "optax")},
        platform_version=version,
    )


def _with_repairs(machine: Machine, config: BackendConfig, *, keep_programs: bool) -> Machine:
    """The machine after what was chosen for it has been made up for."""
    platform = machine.platform
    verdict = read_verdict(
        platform=platform,
        platform_version=machine.platform_version,
        device_kind=machine.device_kind,
    )
    own_repairs = chosen(config.repairs, platform=platform, verdict=verdict)
    # All processes must run the same programs, whatever their own caches hold.
    repairs = tuple(broadcast_from_first(lambda: list(own_repairs)))
    note = None
    if not platform_facts(platform).is_known_to_jax and config.repairs == "auto":
        note = advice(platform, verdict)
    apply_to_lowering(platform, repairs)
    kept = None
    if keep_programs and config.compile_cache is not None:
        force = COMPILE_CACHE in repairs
        if force or platform_facts(platform).is_known_to_jax:
            kept = compile_cache.enable(config.compile_cache, force=force)
    preferences = attention_preferences(platform)
    return dataclasses.replace(
        machine,
        repairs=repairs,
        attention_preferences=preferences[-1:] if PLAIN_ATTENTION in repairs else preferences,
        compile_cache=None if kept is None else str(kept),
        note=note,
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


def _join(place: Rank, *, timeout_s: int, facts: process_facts.Facts) -> None:
    """Join the processes of the run, after making sure that all of them are there."""
    call_roll(
        place.coordinator_address,
        num_processes=place.num_processes,
        process_id=place.process_id,
        timeout_s=timeout_s,
        facts=facts,
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
        # A RuntimeError is that of the network, or of a port taken since the roll call.
        kind = TransientError if isinstance(error, RuntimeError) else UserError
        raise kind(
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


def donated_bytes(compiled: Any) -> tuple[int, int] | None:
    """Bytes of one device that a compiled program was given to use again, and those it does use.

    None where the backend is silent.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    # An argument that the program does not read has no sharding: it is not passed at all.
    infos, shardings = (
        jax.tree.leaves(tree, is_leaf=lambda x: x is None)
        for tree in (compiled.args_info, compiled.input_shardings)
    )
    given = sum(
        math.prod(sharding.shard_shape(info.shape)) * info.dtype.itemsize
        for info, sharding in zip(infos, shardings, strict=True)
        if sharding is not None and info.donated
    )
    return given, memory.alias_size_in_bytes + memory.host_alias_size_in_bytes


def memory_in_use() -> dict[str, list[int]]:
    """Return bytes in use, and their peak, by local device; empty where that is unknown."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    named = {"memory_bytes": "bytes_in_use", "peak_memory_bytes": "peak_bytes_in_use"}
    found = {name: [s[key] for s in stats if key in s] for name, key in named.items()}
    return {name: values for name, values in found.items() if values}
