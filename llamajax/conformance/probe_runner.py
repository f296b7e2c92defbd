"""Run the probes in processes of their own: start them, watch the clock, record every result."""

import collections
import contextlib
import dataclasses
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamajax.backends import ProbeResult, child_environment
from llamajax.config.schema import BackendConfig
from llamajax.conformance.doctor_output import LiveResults
from llamajax.conformance.probe_table import NOT_TRIED, Probe, repairs_for
from llamajax.errors import UserError
from llamajax.processes.line_protocol import Connection

# Where so many probes hang, the device does: the rest would wait for nothing.
_MOST_HANGS = 3
_TRACEBACK_S = 10.0  # on a machine that is busy
_LOOK_EVERY_S = 0.05
# A process imports JAX and starts the backend before its first probe, however short the probes are.
_START_S = 120.0


@dataclasses.dataclass
class ProbeRunner:
    """Runs probes on a backend. machine: facts of backends.Machine, None until it came up.

    limit_s: time of one probe. live: shown which probe begins, and each result. found: what probes
    add to the doctor's JSON.
    """

    backend: BackendConfig
    limit_s: float
    live: LiveResults
    machine: dict[str, Any] | None = None
    results: list[ProbeResult] = dataclasses.field(default_factory=list)
    found: dict[str, Any] = dataclasses.field(default_factory=dict)
    hangs: int = 0

    def run(self, probes: Sequence[Probe]) -> None:
        """Run all of `probes`, in as many processes as it takes.

        Raises UserError where the backend cannot be started as it was asked for.
        """
        left = list(probes)
        while left:
            if reason := self._reason_to_stop():
                self._end(left.pop(0).name, "unsupported", NOT_TRIED + reason, 0.0)
                continue
            if left[0].instead_of and self._status(left[0].instead_of) == "pass":
                left.pop(0)  # there is nothing to repair
                continue
            batch = _batch(left)
            before = len(self.results)
            with (
                tempfile.TemporaryDirectory() as folder,
                _ProbeProcess(self._request(batch, folder)) as process,
            ):
                self._follow(process, batch)
                if len(self.results) == before:
                    text = f"the process for it ended: {process.last_message()}"
                    self._end(left[0].name, "fail", text, 0.0)
            done = {result.name for result in self.results[before:]}
            left = [probe for probe in left if probe.name not in done]

    def _request(self, batch: Sequence[Probe], folder: str) -> dict[str, Any]:
        """Return what a process reads: its backend as these probes want it, names, a folder."""
        first = batch[0]
        repairs: Sequence[str | None] = [first.repair] if first.instead_of else []
        if first.repaired:
            repairs = repairs_for(self.results)
        backend = dataclasses.replace(
            self.backend,
            repairs=",".join(repairs) or "none",
            compile_cache=f"{folder}/programs" if first.keeps_programs else None,
        )
        return {
            "backend": dataclasses.asdict(backend),
            "keep_programs": first.keeps_programs,
            "folder": folder,
            "probes": [{"name": p.name, "function": p.function} for p in batch],
        }

    def _status(self, name: str) -> str | None:
        """Return the status of a probe; None where it was not tried."""
        return next((r.status for r in self.results if r.name == name), None)

    def _reason_to_stop(self) -> str | None:
        """Return why further probes are pointless; None where they are not."""
        if self._status("start") == "fail":
            return "the backend did not start"
        if self._status("program") in ("fail", "unsupported"):
            return "not even the smallest program runs"
        if self.hangs >= _MOST_HANGS:
            return f"{self.hangs} probes before it did not come back"
        return None

    def _follow(self, process: "_ProbeProcess", batch: Sequence[Probe]) -> None:
        """Read messages until the process ends, or until its time for one probe is over."""
        running: str | None = "start"
        begun = time.monotonic()
        self.live.begin("start")
        while True:
            limit_s = max(self.limit_s, _START_S) if running == "start" else self.limit_s
            message = process.read(begun + limit_s - time.monotonic())
            spent_s = time.monotonic() - begun
            if message is None:
                self.hangs += 1
                text = f"did not come back within {limit_s:g} s{process.where()}"
                return self._fail(running, batch, text, spent_s)
            if not message:
                if running is not None:
                    self._fail(running, batch, process.death(), spent_s)
                return None
            if "refused" in message:
                return self._refused(message["refused"], batch)
            running = None
            if "machine" in message:
                if self.machine is None:
                    self._came_up(message["machine"], message["plugin"], spent_s)
            elif "begins" in message:
                running = message["begins"]
                self.live.begin(running)
            else:
                self.found |= message["found"]
                self._end(**message["result"])
                if self._reason_to_stop():
                    return None
            begun = time.monotonic()

    def _came_up(self, machine: dict[str, Any], plugin: str | None, spent_s: float) -> None:
        self.machine, count = machine, machine["num_devices"]
        text = f"{count} device{'s' * (count > 1)} of kind {machine['device_kind']}"
        self._end("start", "pass", text + (f"; plugin {plugin}" if plugin else ""), spent_s)

    def _refused(self, reason: str, batch: Sequence[Probe]) -> None:
        """Handle a backend that was not started: the user's mistake, unless it started before."""
        if self.machine is None:
            raise UserError(reason)
        for probe in batch:
            self._end(probe.name, "unsupported", reason, 0.0)

    def _fail(self, running: str | None, batch: Sequence[Probe], text: str, spent_s: float) -> None:
        """Record a failure of the probe that was running; None: it was between two."""
        if running == "start" and self.machine is not None:
            running, text = batch[0].name, f"the backend did not start again: {text}"
        if running is not None:
            self._end(running, "fail", text, spent_s)

    def _end(self, name: str, status: Any, message: str, time_s: float) -> None:
        result = ProbeResult(name=name, status=status, message=message, time_s=round(time_s, 3))
        self.results.append(result)
        self.live.show(result)


def _batch(left: Sequence[Probe]) -> list[Probe]:
    """Return the probes that the next process gets: as many as want the same one."""

    def wants(probe: Probe) -> tuple[bool, bool]:
        """A process of its own, and one with all repairs."""
        return probe.keeps_programs or probe.instead_of is not None, probe.repaired

    kind = wants(left[0])
    same = itertools.takewhile(lambda probe: wants(probe) == kind, left)
    return [left[0]] if kind[0] else list(same)


class _ProbeProcess:
    """A process that runs probes, the connection to it, and its other output."""

    def __init__(self, request: dict[str, Any]):
        self._log = Path(request["folder"]) / "output.log"
        ours, theirs = socket.socketpair()
        self._connection, self._messages = Connection(ours), collections.deque()
        parent_pipe, self._held = os.pipe()
        environment = child_environment(
            coordinator_address="",
            num_processes=1,
            process_id=0,
            local=(0, 1),
            parent_pipe=parent_pipe,
        )
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llamajax.conformance.probe_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(theirs.fileno(), parent_pipe),
                process_group=0,
            )
        theirs.close()
        os.close(parent_pipe)
        self._connection.send(request)

    def read(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the next message; {} when the process has ended, None when none comes in time."""
        if not self._messages:
            self._messages += self._connection.receive(max(0.0, timeout_s))
        if self._messages:
            return self._messages.popleft()
        return None if self._connection.alive else {}

    def death(self) -> str:
        """Return how the process ended, in words."""
        code = self._process.wait()
        if code >= 0:
            return self.last_message()
        name = signal.Signals(-code).name
        return f"the process ended by {name}{_location(self._output())}: {self.last_message()}"

    def last_message(self) -> str:
        """Return the last line of its output that says something."""
        before, _, _ = self._output().partition("Fatal Python error")
        lines = [line.strip() for line in before.splitlines()]
        said = [line for line in lines if line and not line.startswith(("File ", "*", "^", "~"))]
        fatal = [line for line in said if "Error" in line or "Check failed" in line]
        return (fatal or said or ["it left no message"])[-1][:400]

    def where(self) -> str:
        """Return the line that it executes just now, which it prints on request."""
        self._process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + _TRACEBACK_S
        while not (found := _location(self._output())) and time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):  # as it should be: it hangs
                self._process.wait(timeout=_LOOK_EVERY_S)
        return found

    def _output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> "_ProbeProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        os.close(self._held)


def _location(text: str) -> str:
    """Return the innermost line of a probe in `faulthandler`'s traceback; empty without one."""
    for line in text.splitlines(keepends=True):
        if line.strip().startswith("File ") and "/conformance/" in line and line.endswith("\n"):
            return ", at " + line.rstrip().rpartition("/")[2].replace('", line ', ":")
    return ""
