"""Which process of how many this is, and what a launcher tells its workers.

Both are in environment variables: of a launcher (`child_environment` writes them) or of SLURM.
"""

import contextlib
import dataclasses
import glob
import importlib
import os
import re
import socket
import stat
import sys
import threading
import time
from pathlib import Path

from llamajax.config.forms import parse_address
from llamajax.config.schema import BackendConfig
from llamajax.config.values import Mistyped
from llamajax.errors import ExitCode, UserError, say

_COORDINATOR = "LLAMAJAX_COORDINATOR"  # HOST:PORT of process 0
_NUM_PROCESSES = "LLAMAJAX_NUM_PROCESSES"
_PROCESS_ID = "LLAMAJAX_PROCESS_ID"
# FD:INODE of a pipe of which the launcher holds the other end: one that ends with the launcher, and
# one on which process 0 reports its newest complete checkpoint, a step a line.
_PARENT_PIPE = "LLAMAJAX_PARENT_PIPE"
_CHECKPOINTS = "LLAMAJAX_CHECKPOINTS"

# What limits a process to some of the node's devices, and where the kernel shows how many it has.
_VISIBLE = (
    ("CUDA_VISIBLE_DEVICES", "/dev/nvidia[0-9]*"),
    ("ROCR_VISIBLE_DEVICES", None),  # the kernel's nodes do not tell GPUs of computation apart
    ("ASCEND_RT_VISIBLE_DEVICES", "/dev/davinci[0-9]*"),
)
_ALONE = f"for a process that joins no others set {_NUM_PROCESSES}=1"
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
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
    """Return the rank of this process; None where nothing says.

    Precedence: the config's keys, the variables LLAMAJAX_COORDINATOR, LLAMAJAX_NUM_PROCESSES and
    LLAMAJAX_PROCESS_ID that a launcher sets, SLURM's. Raises UserError for variables that make no
    sense.
    """
    if config.coordinator_address is not None:
        return Rank(
            coordinator_address=config.coordinator_address,
            num_processes=config.num_processes,
            process_id=config.process_id,
        )
    return _rank_of_launcher() or _rank_of_slurm()


def detected_scheduler() -> str | None:
    """Return the scheduler that started several processes, where JAX finds out their ranks."""
    if _number("OMPI_COMM_WORLD_SIZE", 1) > 1:
        return "Open MPI"
    if os.environ.get("KUBERNETES_SERVICE_HOST") and os.environ.get("JOB_COMPLETION_INDEX"):
        return "Kubernetes" if _is_one_of_several_pods() else None
    return None


def _number(name: str, default: int = 0) -> int:
    """Return the number in a scheduler's variable; `default` where it is unset or empty."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name}={text}: is not a number; {_ALONE}")
    return int(text)


def _is_one_of_several_pods() -> bool:
    """Return whether the indexed Kubernetes job of this pod runs several pods at a time.

    Its variables do not tell, so the cluster is asked, for which JAX needs the package kubernetes
    too. Without it pod 0 is taken to be alone, with a warning, and any other one refused.
    """
    index = _number("JOB_COMPLETION_INDEX")
    try:
        kubernetes, urllib3 = map(importlib.import_module, ("kubernetes", "urllib3"))
    except ImportError:
        what = (
            f"JOB_COMPLETION_INDEX={index}: without the package kubernetes (pip install "
            "'jax[k8s]') the other pods of this job cannot be found"
        )
        if index:
            raise UserError(f"{what}: install it, use llamajax.launch, or, {_ALONE}") from None
        say(f"warning: {what}: this process trains alone")
        return False
    try:
        kubernetes.config.load_incluster_config()
        job = kubernetes.client.BatchV1Api().read_namespaced_job(
            name=socket.gethostname().rpartition("-")[0],  # pods are called JOB-INDEX
            namespace=_NAMESPACE.read_text().strip(),
        )
    except (
        OSError,
        kubernetes.config.ConfigException,
        kubernetes.client.ApiException,
        urllib3.exceptions.HTTPError,
    ) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"JOB_COMPLETION_INDEX={index}: the cluster does not say how many pods the job has "
            f"({line}): let the pod's service account read jobs, or, {_ALONE}"
        ) from None
    return (job.spec.parallelism or 1) > 1


def _rank_of_launcher() -> Rank | None:
    names = (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not given:
        return None
    if given.get(_NUM_PROCESSES) == "1":  # one process joins nobody, whatever a scheduler says
        return Rank(coordinator_address="", num_processes=1, process_id=0)
    address, count, rank = (given.get(name, "") for name in names)
    if len(given) < 3 or not (count.isdecimal() and rank.isdecimal()):
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(
            f"{shown}: set {', '.join(names)} to HOST:PORT and two numbers, all three or none"
        )
    try:
        parse_address(address)
    except Mistyped as problem:
        raise UserError(f"{_COORDINATOR}={address}: {problem}") from None
    if int(rank) >= int(count):
        raise UserError(f"{_PROCESS_ID}={rank}: must be below {_NUM_PROCESSES}={count}")
    return Rank(coordinator_address=address, num_processes=int(count), process_id=int(rank))


def _rank_of_slurm() -> Rank | None:
    """Return the rank in a step that `srun` started with several tasks.

    A shell of `salloc` is a step of one task inside a job of several: the job's count is no sign.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if not nodes or not all(os.environ.get(name) for name in names):
        return None
    job, count, rank = map(_number, names)
    if count < 2:
        return None
    if rank >= count:
        raise UserError(f"SLURM_PROCID={rank}: must be below {names[1]}={count}; {_ALONE}")
    # One GPU a task where a node has several tasks and each sees the GPUs of all.
    several = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    is_alone = several is None or int(several.group()) == 1
    is_bound = os.environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    local = (_number("SLURM_LOCALID"),)
    first, number = _SLURM_PORTS
    return Rank(
        coordinator_address=f"{first_host(nodes)}:{first + job % number}",
        num_processes=count,
        process_id=rank,
        local_device_ids=None if is_alone or is_bound else local,
    )


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM list: `a`, `a,b`, `n[01-03],m`, `r[1,4-5]-b`."""
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes}: is not a list of hosts")
    return "".join(part for part in found.groups() if part)


def child_environment(
    *,
    coordinator_address: str,
    num_processes: int,
    process_id: int,
    local: tuple[int, int],
    parent_pipe: int,
    checkpoints: int | None = None,
) -> dict[str, str]:
    """Return the environment of a worker: this process's own, its rank, its share of devices.

    local: (i, n), the i-th of the n workers on this node. parent_pipe: reading end of a pipe that
    the worker inherits; checkpoints: writing end of one for `report_checkpoint`. Raises UserError
    when the node's devices cannot be shared out equally.
    """
    environment = dict(os.environ)
    environment |= {
        _COORDINATOR: coordinator_address,
        _NUM_PROCESSES: str(num_processes),
        _PROCESS_ID: str(process_id),
        _PARENT_PIPE: _named(parent_pipe),
        _CHECKPOINTS: "" if checkpoints is None else _named(checkpoints),
        "PYTHONUNBUFFERED": "1",  # else the last words of a dying worker are lost
    }
    index, count = local
    if count == 1 or os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return environment
    for variable, nodes in _VISIBLE:
        devices = [str(number) for number in range(len(glob.glob(nodes) if nodes else []))]
        if os.environ.get(variable):
            devices = os.environ[variable].split(",")
        if not devices:
            continue
        size, rest = divmod(len(devices), count)
        if rest or not size:
            raise UserError(
                f"{len(devices)} devices ({variable}={','.join(devices)}) cannot be shared by "
                f"{count} workers: choose --processes_per_node among the divisors of "
                f"{len(devices)}, or set JAX_PLATFORMS=cpu to leave them alone"
            )
        environment[variable] = ",".join(devices[index * size : (index + 1) * size])
    return environment


def exit_with_launcher() -> None:
    """End this process at once when the launcher that started it is gone, however it died.

    A worker that goes on alone would hold the devices and the workdir against the next launch. It
    does nothing in a process that no launcher started.
    """
    descriptor = _inherited(_PARENT_PIPE)

    def watch() -> None:
        while os.read(descriptor, 1):
            pass
        say("\nthe launcher is gone: leaving at once")
        os._exit(ExitCode.FAILED)

    if descriptor is not None:
        threading.Thread(target=watch, name="exit_with_launcher", daemon=True).start()


def report_checkpoint(step: int) -> None:
    """Tell the launcher, if there is one, the step of the newest complete checkpoint.

    To be called by process 0 when it starts (0: there is none) and after each save.
    """
    descriptor = _inherited(_CHECKPOINTS)
    if descriptor is not None:
        with contextlib.suppress(OSError):  # the pipe is full: the launcher was stopped
            os.write(descriptor, f"{step}\n".encode())


def _named(descriptor: int) -> str:
    return f"{descriptor}:{os.fstat(descriptor).st_ino}"


def _inherited(variable: str) -> int | None:
    """Return the descriptor of a pipe that the launcher named; later children do not get it.

    None without a launcher, and in a process that a worker started, which inherits the variable
    only.
    """
    descriptor, _, inode = os.environ.get(variable, "").partition(":")
    if not (descriptor.isdigit() and inode.isdigit()):
        return None
    try:
        status = os.fstat(int(descriptor))
    except OSError:
        return None
    if not stat.S_ISFIFO(status.st_mode) or status.st_ino != int(inode):
        return None
    os.set_inheritable(int(descriptor), False)
    return int(descriptor)


def report_alive() -> None:
    """Tell a launcher that this process makes progress, also where it prints nothing for long.

    Touches the log that stderr goes to, if it is a file; the launcher looks at its time.
    """
    try:
        descriptor = sys.stderr.fileno()
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.utime(descriptor)
    except (OSError, ValueError):
        return  # no stderr, or none with a descriptor


def last_alive_s(log: int) -> float:
    """Return when a worker last wrote to its open log or called `report_alive`.

    Another time at every call where the file system has lost the file: nothing is known then.
    """
    try:
        return os.fstat(log).st_mtime
    except OSError:
        return time.monotonic()


def keep_harness_from_forking() -> None:
    """Have lm-evaluation-harness draw its bootstrap samples here: a fork of JAX's threads hangs."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
