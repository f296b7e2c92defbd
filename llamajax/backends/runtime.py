"""Bringing JAX up on the platform that was asked for, or saying clearly why it did not come up.

The only place that writes environment variables and JAX's configuration.
"""

import dataclasses
import importlib.metadata
import os
from collections.abc import Callable

import jax

from llamajax.backends import compile_cache
from llamajax.backends.devices import give_gpu_memory, use_device_table
from llamajax.backends.jax_private.experimental_warning import no_experimental_warning
from llamajax.backends.platforms import platform_facts
from llamajax.backends.plugin import named_to_jax, why_not
from llamajax.backends.process_environment import Rank, detected_scheduler, find_rank
from llamajax.backends.repairs import (
    COMPILE_CACHE,
    PLAIN_ATTENTION,
    SYNCHRONOUS_CHECKPOINTS,
    advice,
    apply_to_lowering,
    choose_repairs,
    is_donating,
    read_verdict,
)
from llamajax.config.schema import BackendConfig
from llamajax.errors import TransientError, UserError
from llamajax.processes import process_facts
from llamajax.processes.host_collectives import broadcast_from_first
from llamajax.processes.roll_call import call_roll

PLUGIN_VARIABLE = "LLAMAJAX_PJRT_PLUGIN"
# A process that stays silent so long is dead to the others; JAX's own 100 s waste a pod's time.
_HEARTBEAT_S = 20
# Settings of JAX on which the bits of every run depend, its random numbers first of all.
_NUMBERS = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """The machine that a run has got, as it prints and stores it.

    platform: as JAX's devices say, but AMD's GPUs are "rocm". repairs: names from `repairs.py`.
    compile_cache: folder of compiled programs, None where they are not kept. note: what the user
    should know.
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
    compile_cache: str | None = None
    note: str | None = None

    @property
    def is_primary(self) -> bool:
        """Whether this process writes logs and metrics."""
        return self.process_id == 0

    @property
    def attention_preferences(self) -> tuple[str, ...]:
        """Attention implementations to try, best first."""
        found = platform_facts(self.platform).attention_preferences
        return found[-1:] if PLAIN_ATTENTION in self.repairs else found

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
    """Start JAX, and join the other processes of the run if there are any. Return the machine.

    Precedence: config keys, the variable LLAMAJAX_PJRT_PLUGIN=name:/path.so, JAX_PLATFORMS.
    keep_programs: whether compiled programs are kept in `config.compile_cache`. facts: called where
    there are several processes, for what must be the same in all of them (`process_facts`). Raises
    UserError when it is not, and when the backend that was asked for does not come up: never a
    silent run on the CPU.
    """
    config = _with_environment(config)
    ignored = _fix_numbers()
    use_device_table(config.device_table)
    give_gpu_memory()  # before JAX's CUDA plugin reads it; elsewhere it means nothing
    if config.num_cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", config.num_cpu_devices)
    if config.name:
        # The CPU stays available to the host side; being first, the wanted one must come up.
        is_cpu = platform_facts(config.name).is_host
        jax.config.update("jax_platforms", config.name if is_cpu else f"{config.name},cpu")
    rank = find_rank(config)
    scheduler = detected_scheduler() if rank is None else None
    with named_to_jax(config):
        if scheduler or (rank is not None and rank.num_processes > 1):
            _join(rank, scheduler, timeout_s=config.timeout_s, facts=facts)
        devices = _devices(config)
    if rank is not None and jax.process_count() != rank.num_processes:
        raise UserError(
            f"{rank.num_processes} processes were asked for, but {jax.process_count()} came: "
            f"platform {devices[0].platform!r} does not join processes"
        )
    if rank is None and jax.process_count() > 1:
        process_facts.check_same(facts())
    machine = _with_repairs(_machine(devices), config, keep_programs=keep_programs)
    notes = [note for note in (machine.note, ignored) if note]
    return dataclasses.replace(machine, note="; ".join(notes) or None)


def _fix_numbers() -> str | None:
    """Set what would change numbers back to JAX's default, and say so if it was something else.

    Of variables that change other things, such as the precision of products, nothing is touched:
    the record of a run has all that are set. Raises UserError where nothing could be compiled.
    """
    if jax.config.jax_disable_jit:
        raise UserError(
            "JAX_DISABLE_JIT is set: a step runs as one compiled program or not at all; unset it"
        )
    changed = [name for name, value in _NUMBERS.items() if getattr(jax.config, name) != value]
    for name in changed:
        jax.config.update(name, _NUMBERS[name])
    if not changed:
        return None
    names = ", ".join(map(str.upper, changed))
    return f"{names} of the environment would change the numbers and is ignored"


def _devices(config: BackendConfig) -> list[jax.Device]:
    """Return the devices of the platform that was asked for; UserError when it does not come up."""
    wanted = config.name or os.environ.get("JAX_PLATFORMS", "").partition(",")[0]
    try:
        with no_experimental_warning():
            devices = jax.devices()
        is_cpu = platform_facts(devices[0].platform).is_host
    except RuntimeError as error:
        raise UserError(why_not(wanted or "the default", str(error), config)) from None
    except AssertionError:  # JAX's, for a host without the only platform that it may use
        raise UserError(why_not(wanted, f"{wanted} provides no devices", config)) from None
    # JAX leaves cuda and rocm out where the host has no such device, and says nothing.
    if wanted and is_cpu and not platform_facts(wanted).is_host:
        raise UserError(why_not(wanted, f"{wanted} provides no devices", config))
    return devices


def platform_version(device: jax.Device) -> str:
    """Return the version that a device's backend says of itself, on one line."""
    return " ".join(str(device.client.platform_version).split())


def _machine(devices: list[jax.Device]) -> Machine:
    first, version = devices[0], platform_version(devices[0])
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
    """Make the repairs that were chosen for the machine, and keep its programs if asked to."""
    platform, verdict = machine.platform, read_verdict(machine)
    # All processes must run the same programs, whatever verdict their own caches hold.
    own = choose_repairs(config.repairs, platform, verdict)
    repairs = tuple(broadcast_from_first(lambda: list(own)))
    apply_to_lowering(platform, repairs)
    is_known, force = platform_facts(platform).is_known_to_jax, COMPILE_CACHE in repairs
    kept = None
    if keep_programs and config.compile_cache is not None and (force or is_known):
        kept = compile_cache.enable(config.compile_cache, force=force)
    return dataclasses.replace(
        machine,
        repairs=repairs,
        compile_cache=None if kept is None else str(kept),
        note=None if is_known or config.repairs != "auto" else advice(platform, verdict),
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


def _join(
    rank: Rank | None,
    scheduler: str | None,
    *,
    timeout_s: int,
    facts: Callable[[], process_facts.Facts],
) -> None:
    """Join the processes of the run: as `rank` says, after making sure that all of them are there.

    Without a rank JAX asks the scheduler for coordinator, number and rank.
    """
    settings = {"initialization_timeout": timeout_s, "heartbeat_timeout_seconds": _HEARTBEAT_S}
    if rank is not None:
        call_roll(
            rank.coordinator_address,
            num_processes=rank.num_processes,
            process_id=rank.process_id,
            timeout_s=timeout_s,
            facts=facts(),
        )
        # deactivate: a launcher's workers are no scheduler's tasks
        settings |= dataclasses.asdict(rank) | {"cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(**settings)
    except (RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0]
        if rank is None:
            raise UserError(
                f"{scheduler} started several processes, but JAX could not join them: {line}. Set "
                "backend.coordinator_address, num_processes and process_id, or start them with "
                "llamajax.launch"
            ) from None
        # A RuntimeError is that of the network, or of a port taken since the roll call.
        kind = TransientError if isinstance(error, RuntimeError) else UserError
        raise kind(
            f"process {rank.process_id} of {rank.num_processes} could not join the coordinator "
            f"{rank.coordinator_address}: {line}"
        ) from None
