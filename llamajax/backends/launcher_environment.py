"""What a launcher tells its workers through the environment, and how a worker follows it.

Written by `child_environment` in the launcher, read in the worker: its place among the processes of
the run, its share of the node's devices, and a pipe that ends when the launcher does.
"""

import contextlib
import glob
import os
import stat
import sys
import threading
import time

from llamajax.errors import ExitCode, UserError, say

COORDINATOR = "LLAMAJAX_COORDINATOR"  # HOST:PORT of process 0
NUM_PROCESSES = "LLAMAJAX_NUM_PROCESSES"
PROCESS_ID = "LLAMAJAX_PROCESS_ID"
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


def child_environment(
    *,
    coordinator_address: str,
    num_processes: int,
    process_id: int,
    local: tuple[int, int],
    parent_pipe: int,
    checkpoints: int | None = None,
) -> dict[str, str]:
    """The environment of one worker: this process's own, its place, and its share of devices.

    local: (i, n), the i-th of the n workers on this node. parent_pipe: reading end of a pipe that
    the worker inherits; checkpoints: writing end of one for `report_checkpoint`. UserError when
    the node's devices cannot be shared out equally.
    """
    environment = dict(os.environ)
    environment |= {
        COORDINATOR: coordinator_address,
        NUM_PROCESSES: str(num_processes),
        PROCESS_ID: str(process_id),
        _PARENT_PIPE: _named(parent_pipe),
        _CHECKPOINTS: "" if checkpoints is None else _named(checkpoints),
        "PYTHONUNBUFFERED": "1",  # else the last words of a dying worker are lost
    }
    if local[1] > 1 and os.environ.get("JAX_PLATFORMS", "").split(",")[0] != "cpu":
        for variable, nodes in _VISIBLE:
            devices = _devices(variable, nodes)
            if devices:
                environment[variable] = ",".join(_share(devices, local, variable))
    return environment


def _devices(variable: str, nodes: str | None) -> list[str]:
    """Ids of the devices of one kind that may be used here; empty where there are none."""
    if os.environ.get(variable):
        return os.environ[variable].split(",")
    found = glob.glob(nodes) if nodes else []
    return [str(number) for number in range(len(found))]


def _share(devices: list[str], local: tuple[int, int], variable: str) -> list[str]:
    index, count = local
    size, rest = divmod(len(devices), count)
    if rest or not size:
        raise UserError(
            f"{len(devices)} devices ({variable}={','.join(devices)}) cannot be shared by "
            f"{count} workers: choose --processes_per_node among the divisors of {len(devices)}, "
            "or set JAX_PLATFORMS=cpu to leave them alone"
        )
    return devices[index * size : (index + 1) * size]


def exit_with_launcher() -> None:
    """End this process at once when the launcher that started it is gone, however it died.

    A worker that goes on alone would hold the devices and the workdir against the next launch. It
    does nothing in a process that no launcher started.
    """
    descriptor = _inherited(_PARENT_PIPE)
    if descriptor is not None:
        threading.Thread(
            target=_watch, args=(descriptor,), name="exit_with_launcher", daemon=True
        ).start()


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
    """The descriptor of a pipe that the launcher named, or None; later children do not get it."""
    descriptor, _, inode = os.environ.get(variable, "").partition(":")
    if not (descriptor.isdigit() and inode.isdigit()):
        return None
    try:
        status = os.fstat(int(descriptor))
    except OSError:
        return None  # a process that a worker started, which inherited the variable only
    if not stat.S_ISFIFO(status.st_mode) or status.st_ino != int(inode):
        return None
    os.set_inheritable(int(descriptor), False)
    return int(descriptor)


def _watch(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    say("\nthe launcher is gone: leaving at once")
    os._exit(ExitCode.FAILED)


def report_alive() -> None:
    """Tell a launcher that this process gets on, also where it prints nothing for long.

    Touches the log that stderr goes to, if it is a file; the launcher looks at its time.
    """
    try:
        descriptor = sys.stderr.fileno()
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.utime(descriptor)
    except (OSError, ValueError):
        return  # no stderr, or none with a descriptor


def last_alive_s(log: int) -> float:
    """When a worker last wrote to its open log or showed itself alive; another time at every call
    where the file system has lost the file: nothing is known then."""
    try:
        return os.fstat(log).st_mtime
    except OSError:
        return time.monotonic()
