"""Which process of how many this is: from the config, from a launcher, or from a scheduler."""

import dataclasses
import os
import re

from llamajax.backends.launcher_environment import COORDINATOR, NUM_PROCESSES, PROCESS_ID
from llamajax.config.schema import BackendConfig
from llamajax.errors import UserError

# SLURM gives every job its own port this way; it is JAX's choice as well.
_SLURM_PORTS = (65536 - 4096, 4096)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rank:
    """One process among those of a run.

    coordinator_address: HOST:PORT of process 0. local_device_ids: which of the visible GPUs are
    this process's; None: all.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None


def find_rank(config: BackendConfig) -> Rank | None:
    """The place that was given to this process; None where nothing says.

    Precedence: the config's keys, the variables LLAMAJAX_COORDINATOR, LLAMAJAX_NUM_PROCESSES and
    LLAMAJAX_PROCESS_ID that a launcher sets, SLURM's. UserError for variables without sense.
    """
    if config.coordinator_address is not None:
        return Rank(
            coordinator_address=config.coordinator_address,
            num_processes=config.num_processes,
            process_id=config.process_id,
        )
    return _of_launcher() or _of_slurm()


def detected_scheduler() -> str | None:
    """The scheduler that started several processes of which JAX has to find out more, or None."""
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        return "Kubernetes"
    return None


def _of_launcher() -> Rank | None:
    names = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not given:
        return None
    if given.get(NUM_PROCESSES) == "1":  # one process joins nobody, whatever a scheduler says
        return Rank(coordinator_address="", num_processes=1, process_id=0)
    address, count, rank = (given.get(name, "") for name in names)
    if not (re.fullmatch(r".+:\d+", address) and count.isdecimal() and rank.isdecimal()):
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(
            f"{shown}: set {', '.join(names)} to HOST:PORT and two numbers, all three or none"
        )
    if int(rank) >= int(count):
        raise UserError(f"{PROCESS_ID}={rank}: must be below {NUM_PROCESSES}={count}")
    return Rank(coordinator_address=address, num_processes=int(count), process_id=int(rank))


def _of_slurm() -> Rank | None:
    """The place in a step that `srun` started with several tasks.

    A shell of `salloc` is a step of one task inside a job of several: the job's count is no sign.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST")
    if any(name not in os.environ for name in names):
        return None
    job, count, rank, nodes = (os.environ[name] for name in names)
    if int(count) < 2:
        return None
    first, number = _SLURM_PORTS
    return Rank(
        coordinator_address=f"{first_host(nodes)}:{first + int(job) % number}",
        num_processes=int(count),
        process_id=int(rank),
        local_device_ids=_slurm_devices(),
    )


def _slurm_devices() -> tuple[int, ...] | None:
    """One GPU a task where a node has several tasks and each sees the GPUs of all."""
    several = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    alone = several is None or int(several.group()) == 1
    bound = os.environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    return None if alone or bound else (int(os.environ.get("SLURM_LOCALID", "0")),)


def first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes it: `a`, `a,b`, `n[01-03],m`, `r[1,4-5]-b`."""
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes}: is not a list of hosts")
    return "".join(part for part in found.groups() if part)
