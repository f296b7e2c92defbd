"""The parent of the probes: starts processes for them, watches the clock, and says who did it."""

import contextlib
import dataclasses
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from llamajax.backends import ProbeResult as Outcome
from llamajax.backends import child_environment
from llamajax.config.schema import BackendConfig
from llamajax.conformance.probe_table import NOT_TRIED, Probe, judge
from llamajax.errors import UserError

# Where so many probes hang, the device does: the rest would wait for nothing.
_MOST_HANGS = 3
_LAST_WORDS_S = 1.0
# A process imports JAX and starts the backend before its first probe: that takes no account of
# how short the probes are.
_START_S = 120.0


@dataclasses.dataclass
class ProbeRunner:
    """What has been found so far. machine: facts of backends.Machine, None until it came up."""

    backend: BackendConfig
    limit_s: float
    show: Callable[[Outcome], None]
    begin: Callable[[str], None]
    machine: dict[str, Any] | None = None
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)
    hangs: int = 0

    def run(self, probes: Sequence[Probe]) -> None:
        """Try all of `probes`, in as many processes as it takes.

        Raises UserError where the backend cannot be started as it was asked for.
        """
        left = list(probes)
        while left:
            if reason := self._hopeless():
                self._end(left.pop(0).name, "unsupported", NOT_TRIED + reason, 0.0)
                continue
            if left[0].instead_of and self.status(left[0].instead_of) == "pass":
                left.pop(0)  # there is nothing to repair
                continue
            batch = _batch(left)
            before = len(self.outcomes)
            with (
                tempfile.TemporaryDirectory() as folder,
                _Child(self._request(batch, folder)) as child,
            ):
                self._follow(child, batch)
                if len(self.outcomes) == before:
                    text = f"the process for it ended: {child.words()}"
                    self._end(left[0].name, "fail", text, 0.0)
            done = {outcome.name for outcome in self.outcomes[before:]}
            left = [probe for probe in left if probe.name not in done]

    def _request(self, batch: Sequence[Probe], folder: str) -> dict[str, Any]:
        """What a child is told: its backend as these probes want it, their names, a folder."""
        first = batch[0]
        forced = [first.repair] if first.instead_of else []
        if first.repaired:
            forced = judge(self.outcomes).repairs
        backend = dataclasses.replace(
            self.backend,
            repairs=",".join(forced) or "none",
            compile_cache=f"{folder}/programs" if first.keeps_programs else None,
        )
        return {
            "backend": dataclasses.asdict(backend),
            "keep_programs": first.keeps_programs,
            "folder": folder,
            "probes": [{"name": p.name, "function": p.function} for p in batch],
        }

    def status(self, name: str) -> str | None:
        """Of a probe that was tried."""
        return next((o.status for o in self.outcomes if o.name == name), None)

    def _hopeless(self) -> str | None:
        """Why further probes would tell nothing."""
        if self.status("start") == "fail":
            return "the backend did not start"
        if self.status("program") in ("fail", "unsupported"):
            return "not even the smallest program runs"
        if self.hangs >= _MOST_HANGS:
            return f"{self.hangs} probes before it did not come back"
        return None

    def _follow(self, child: "_Child", batch: Sequence[Probe]) -> None:
        """Read what a child says until it ends, or until its time for one probe is over."""
        running: str | None = "start"
        begun = time.monotonic()
        self.begin("start")
        while True:
            limit_s = max(self.limit_s, _START_S) if running == "start" else self.limit_s
            said = child.hear(begun + limit_s - time.monotonic())
            spent = time.monotonic() - begun
            if said is None:
                self.hangs += 1
                text = f"did not come back within {limit_s:g} s{child.where()}"
                return self._blame(running, batch, text, spent)
            if not said:
                if running is not None:
                    self._blame(running, batch, child.death(), spent)
                return None
            if "refused" in said:
                return self._refused(said["refused"], batch)
            if "machine" in said:
                self._came_up(said["machine"], said["plugin"], spent)
                running = None
            elif "begins" in said:
                running = said["begins"]
                self.begin(running)
            else:
                self._end(said["ends"], said["status"], said["message"], said["time_s"])
                running = None
                if self._hopeless():
                    return None
            begun = time.monotonic()

    def _came_up(self, machine: dict[str, Any], plugin: str | None, spent: float) -> None:
        if self.machine is None:
            self.machine = machine
            count = machine["num_devices"]
            text = f"{count} device{'s' * (count > 1)} of kind {machine['device_kind']}"
            text += f"; plugin {plugin}" if plugin else ""
            self._end("start", "pass", text, spent)

    def _refused(self, reason: str, batch: Sequence[Probe]) -> None:
        """The backend was not started: a mistake in the command, unless it started before."""
        if self.machine is None:
            raise UserError(reason)
        for probe in batch:
            self._end(probe.name, "unsupported", reason, 0.0)

    def _blame(self, running: str | None, batch: Sequence[Probe], text: str, spent: float) -> None:
        """Say who was running when a process hung or ended; None: nobody, it was between two."""
        if running == "start" and self.machine is not None:
            running, text = batch[0].name, f"the backend did not start again: {text}"
        if running is not None:
            self._end(running, "fail", text, spent)

    def _end(self, name: str, status: Any, message: str, time_s: float) -> None:
        outcome = Outcome(name=name, status=status, message=message, time_s=round(time_s, 3))
        self.outcomes.append(outcome)
        self.show(outcome)


def _batch(left: Sequence[Probe]) -> list[Probe]:
    """The probes that the next process gets: as many as want the same one."""
    kind = _kind(left[0])
    if kind[0]:
        return [left[0]]
    return list(itertools.takewhile(lambda probe: _kind(probe) == kind, left))


def _kind(probe: Probe) -> tuple[bool, bool]:
    """Whether a probe wants a process of its own, and one with all repairs."""
    own = probe.alone or probe.keeps_programs or probe.instead_of is not None
    return own, probe.repaired


class _Child:
    """A process that runs probes, the pipe on which it tells of them, and its other output."""

    def __init__(self, request: dict[str, Any]):
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._pipe, theirs = os.pipe()
        parent_pipe, self._held = os.pipe()
        environment = child_environment(
            coordinator_address="",
            num_processes=1,
            process_id=0,
            local=(0, 1),
            parent_pipe=parent_pipe,
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llamajax.conformance.probe_process", str(theirs)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            pass_fds=(theirs, parent_pipe),
            process_group=0,
        )
        os.close(theirs)
        os.close(parent_pipe)
        with contextlib.suppress(BrokenPipeError):  # it died at once; reading from it tells
            self._process.stdin.write(json.dumps(request))
            self._process.stdin.close()
        self._buffer = b""

    def hear(self, patience_s: float) -> dict[str, Any] | None:
        """What it says next; empty when it has ended, None when it says nothing in time."""
        until = time.monotonic() + patience_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._pipe], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return None
            read = os.read(self._pipe, 65536)
            if not read:
                return {}
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def death(self) -> str:
        """How it ended, for people."""
        code = self._process.wait()
        if code >= 0:
            return self.words()
        name = signal.Signals(-code).name
        return f"the process ended by {name}{_place(self._text())}: {self.words()}"

    def words(self) -> str:
        """The last line of its output that says something."""
        before, _, _ = self._text().partition("Fatal Python error")
        lines = [line.strip() for line in before.splitlines()]
        said = [line for line in lines if line and not line.startswith(("File ", "*", "^", "~"))]
        fatal = [line for line in said if "Error" in line or "Check failed" in line]
        return (fatal or said or ["it left no message"])[-1][:400]

    def where(self) -> str:
        """What it executes just now, as it tells on request."""
        self._process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):  # as it should be: it hangs
            self._process.wait(timeout=_LAST_WORDS_S)
        return _place(self._text())

    def _text(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()
        os.close(self._pipe)
        os.close(self._held)


def _place(text: str) -> str:
    """The innermost line of a probe in a traceback that `faulthandler` wrote; empty without one."""
    for line in text.splitlines():
        if line.strip().startswith("File ") and "/conformance/" in line:
            return ", at " + line.rpartition("/")[2].replace('", line ', ":")
    return ""
