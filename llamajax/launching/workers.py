"""The workers of one attempt on this node."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from llamajax.backends import child_environment, last_alive_s
from llamajax.errors import restart_helps
from llamajax.launching.launch_options import LaunchOptions
from llamajax.launching.worker_logs import Echo, last_lines, log_path, open_log

_REAP_S = 10  # a killed process that the kernel cannot end (stuck in I/O) is left behind


def exit_code(returncode: int) -> int:
    """Return the code as a shell gives it: 128 + N for a process that signal N ended."""
    return returncode if returncode >= 0 else 128 - returncode


def first_failed(returncodes: Mapping[int, int]) -> int:
    """Return the rank that probably failed first, of workers that were seen to fail at one time.

    An abort is how JAX answers the loss of another process: seldom the cause. A code after which
    a restart cannot help always is one.
    """

    def key(rank: int) -> tuple[bool, bool, int]:
        return returncodes[rank] == -signal.SIGABRT, restart_helps(returncodes[rank]), rank

    return min(returncodes, key=key)


class WorkerGroup:
    """Starts workers with one attempt number, each in a process group of its own.

    told_to_stop: by `stop`. reported: whether node 0 knows how the attempt ended.
    """

    def __init__(
        self, options: LaunchOptions, *, attempt: int, address: str, parent_pipe: int, reports: int
    ):
        """address: HOST:PORT of process 0. parent_pipe, reports: as `child_environment` wants."""
        self._options, self.attempt = options, attempt
        self.told_to_stop = self.reported = False
        self._processes: dict[int, subprocess.Popen] = {}
        self._pidfds: dict[int, int] = {}
        self._logs: dict[int, BinaryIO] = {}
        self._alive_at: dict[int, float] = {}
        self._progress_at = time.monotonic()
        self._echo: Echo | None = None
        with contextlib.ExitStack() as undo:
            undo.callback(self.end)
            for local, rank in enumerate(options.ranks):
                environment = child_environment(
                    coordinator_address=address,
                    num_processes=options.num_processes,
                    process_id=rank,
                    local=(local, options.processes_per_node),
                    parent_pipe=parent_pipe,
                    checkpoints=reports if rank == 0 else None,
                )
                log = self._logs[rank] = open_log(options.logs, rank, attempt)
                process = self._processes[rank] = subprocess.Popen(
                    options.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    pass_fds=(parent_pipe, reports) if rank == 0 else (parent_pipe,),
                    start_new_session=True,  # Ctrl-C reaches the launcher alone, which forwards it
                )
                self._pidfds[rank] = os.pidfd_open(process.pid)
            undo.pop_all()
        if 0 in self._processes:
            self._echo = Echo(self._logs[0].fileno(), sys.stdout.fileno())

    def log(self, rank: int) -> Path:
        """Return the path of a worker's log."""
        return log_path(self._options.logs, rank, self.attempt)

    @property
    def pids(self) -> list[int]:
        """Process ids of all workers, by rank."""
        return [process.pid for process in self._processes.values()]

    @property
    def running(self) -> list[int]:
        """Ranks of the workers that `ended` has not returned yet."""
        return list(self._pidfds)

    @property
    def codes(self) -> list[int]:
        """Exit codes of the workers that ended."""
        codes = [process.returncode for process in self._processes.values()]
        return [exit_code(code) for code in codes if code is not None]

    @property
    def wakers(self) -> list[int]:
        """Descriptors that become readable when a worker ends."""
        return list(self._pidfds.values())

    def ended(self) -> dict[int, int]:
        """Return the return codes of the workers that ended since the last call, by rank."""
        found = {}
        for rank in self.running:
            returncode = self._processes[rank].poll()
            if returncode is not None:
                found[rank] = returncode
                os.close(self._pidfds.pop(rank))
        return found

    def last_lines(self, rank: int, count: int) -> list[str]:
        """Return the last lines that a worker wrote."""
        return last_lines(self._logs[rank].fileno(), count)

    def idle_s(self) -> float:
        """Return the seconds since any running worker wrote to its log or touched it."""
        now = time.monotonic()
        alive_at = {rank: last_alive_s(self._logs[rank].fileno()) for rank in self.running}
        if alive_at != self._alive_at:
            self._alive_at, self._progress_at = alive_at, now
        return now - self._progress_at

    def echo(self) -> None:
        """Copy what worker 0 wrote since the last call to standard output."""
        if self._echo is not None:
            self._echo.copy()

    def send(self, number: int) -> None:
        """Signal the running workers and their children."""
        for rank in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._processes[rank].pid, number)

    def stop(self) -> None:
        """Send SIGTERM to the running workers, once: a worker may count them."""
        if not self.told_to_stop:
            self.told_to_stop = True
            self.send(signal.SIGTERM)

    def ask_for_stacks(self) -> None:
        """Send SIGUSR1 to the workers that catch it: it ends any other."""
        for rank in self.running:
            pid = self._processes[rank].pid
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                caught = int(re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE).group(1), 16)
                if caught >> (signal.SIGUSR1 - 1) & 1:
                    os.kill(pid, signal.SIGUSR1)

    def end(self) -> None:
        """Kill what still runs, children of workers included."""
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_REAP_S)
        for descriptor in self._pidfds.values():
            os.close(descriptor)
        self._pidfds.clear()
        self.echo()
        self._echo = None
        for log in self._logs.values():
            log.close()
