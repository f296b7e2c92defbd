"""The launcher of one node: starts an attempt when told, tells what happens, ends it when told."""

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Iterator

from llamajax import errors
from llamajax.errors import ExitCode
from llamajax.launching.launch_options import Request, make_log_dir
from llamajax.launching.node_protocol import Hub, Spoke
from llamajax.launching.restart_policy import Message
from llamajax.launching.worker_logs import next_attempt
from llamajax.launching.workers import Team, culprit, exit_code
from llamajax.verbs import STOP_SIGNALS, caught_signals

_LOOK_EVERY_S = 0.1
_SHOWN_LINES = 20
_STACKS_WITHIN_S = 1.0


def launch(request: Request) -> int:
    """Run the command on all workers until it is done, stopped or given up; the exit code."""
    make_log_dir(request.log_dir)
    wire = Hub(request) if request.node_rank == 0 else Spoke(request)
    with contextlib.closing(wire), _caught() as signals, _pipe() as lifeline, _pipe() as reports:
        os.set_blocking(reports[1], False)  # a worker never waits for its launcher
        launcher = Launcher(request, wire, lifeline=lifeline[0], reports=reports)
        try:
            return launcher.run(signals)
        finally:
            launcher.leave()


def say(text: str) -> None:
    """One line of the launcher's own."""
    errors.say(f"launch: {text}")


class Launcher:
    """What one node does; `wire` leads to all of them."""

    def __init__(
        self, request: Request, wire: Hub | Spoke, *, lifeline: int, reports: tuple[int, int]
    ):
        """lifeline: reading end of a pipe. reports: both ends of that which worker 0 writes to."""
        self._request, self._wire, self._lifeline = request, wire, lifeline
        self._reports = reports
        self._team: Team | None = None
        self._again_at: float | None = None
        self._asked_to_stop = False
        self._told_to_stop = False
        self._reported = False
        self._codes: list[int] = []

    def run(self, signals: int) -> int:
        """The loop. signals: descriptor that gives the number of each caught signal."""
        self._be_ready()
        while True:
            self._pass_on_reports()
            for order in self._wire.orders():
                code = self._obey(order)
                if code is not None:
                    return code
            if self._again_at is not None and time.monotonic() >= self._again_at:
                self._again_at = None
                self._be_ready()
            if self._team is not None:
                self._look()
            wakers = [signals, *self._wire.wakers, *(self._team.wakers if self._team else ())]
            if signals in select.select(wakers, [], [], _LOOK_EVERY_S)[0]:
                numbers = os.read(signals, 64)
                if signal.SIGUSR1 in numbers and self._team is not None:
                    self._team.ask_for_stacks()
                    say("the workers write their stacks to their logs")
                code = self._stop(numbers) if set(numbers) & set(STOP_SIGNALS) else None
                if code is not None:
                    return code

    def leave(self) -> None:
        """Whatever happened: leave no worker behind."""
        if self._team is not None:
            self._team.end()
            self._team = None

    def _be_ready(self) -> None:
        self._wire.say(
            {
                "say": "ready",
                "attempt": next_attempt(self._request.log_dir, self._request.ranks),
                "nodes": self._request.nodes,
                "processes_per_node": self._request.processes_per_node,
            }
        )

    def _obey(self, order: Message) -> int | None:
        """Do what node 0 decided; the exit code when that is to leave."""
        match order["order"]:
            case "start":
                self._start(order["attempt"])
            case "stop":
                self._tell_to_stop()
            case "end":
                self.leave()
                return self._end(order)
        return None

    def _start(self, attempt: int) -> None:
        request = self._request
        host, port = request.coordinator or ("127.0.0.1", _free_port())
        self._reported, self._told_to_stop, self._codes = False, False, []
        self._team = Team(
            request,
            attempt=attempt,
            address=f"{host}:{port}",
            lifeline=self._lifeline,
            reports=self._reports[1],
        )
        ranks, pids = request.ranks, ", ".join(map(str, self._team.pids))
        say(
            f"attempt {attempt}: workers {ranks[0]} to {ranks[-1]} of {request.num_processes} "
            f"started (pids {pids}), logs in {request.log_dir}"
        )

    def _end(self, order: Message) -> int | None:
        say(order["why"])
        for line in order["lines"]:
            errors.say(f"  | {line}")
        if order["then"]:
            say(order["then"])
        if order["again_in_s"] is None:
            return order["code"]
        self._again_at = time.monotonic() + order["again_in_s"]
        return None

    def _pass_on_reports(self) -> None:
        """Tell node 0 which checkpoints are complete, before it hears of a failure."""
        reading = self._reports[0]
        if select.select([reading], [], [], 0)[0]:
            for step in os.read(reading, 1 << 16).split():
                self._wire.say({"say": "checkpoint", "step": int(step)})

    def _look(self) -> None:
        """See what the workers do: their output, their ends, their silence."""
        team = self._team
        assert team is not None
        team.echo()
        ended = team.ended()
        self._codes += [exit_code(code) for code in ended.values()]
        failed = {r: c for r, c in ended.items() if c and exit_code(c) != ExitCode.STOPPED}
        # One that SIGTERM killed outright stopped, if it was told to; else somebody killed it.
        if not self._told_to_stop and ExitCode.STOPPED not in ended.values():
            failed |= {r: c for r, c in ended.items() if c == -signal.SIGTERM}
        if self._reported:
            return
        if failed:
            self._report_failure(failed)
        elif ended and not team.running:
            self._reported = True
            code = ExitCode.STOPPED if ExitCode.STOPPED in self._codes else 0
            self._wire.say({"say": "ended", "attempt": team.attempt, "code": code})
        elif ExitCode.STOPPED in ended.values():
            self._wire.say({"say": "stopping"})
        elif team.idle_s() > self._request.timeout_s:
            self._report_stall()

    def _report_failure(self, failed: dict[int, int]) -> None:
        rank = culprit(failed)
        code = failed[rank]
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed: code {code}"
        self._report(exit_code(code), f"worker {rank} {how}", rank)

    def _report_stall(self) -> None:
        assert self._team is not None
        self._team.send(signal.SIGUSR1)  # workers of ours answer with the stacks of their threads
        select.select([], [], [], _STACKS_WITHIN_S)
        rank = self._team.running[0]
        self._report(ExitCode.STALLED, f"no progress within {self._request.timeout_s:g} s", rank)

    def _report(self, code: int, what: str, rank: int) -> None:
        assert self._team is not None
        self._pass_on_reports()
        self._reported = True
        log = self._team.log(rank)
        lines = self._team.last_lines(rank, _SHOWN_LINES)
        node = f" (node {self._request.node_rank})" if self._request.nodes > 1 else ""
        rest = f"the last lines of {log}:" if lines else f"{log} is empty"
        self._wire.say(
            {
                "say": "failed",
                "attempt": self._team.attempt,
                "code": code,
                "why": f"{what}{node}; {rest}",
                "lines": lines,
            }
        )

    def _stop(self, numbers: bytes) -> int | None:
        """Let the workers save at the first stop signal; end them at a later Ctrl-C.

        A lost terminal and some schedulers send two signals in a row, so no other ends them.
        """
        again, self._asked_to_stop = self._asked_to_stop, True
        self._wire.say({"say": "stopping"})
        if self._team is None or (again and signal.SIGINT in numbers):
            self.leave()
            say("stopped at once")
            return ExitCode.STOPPED
        if again:
            return None
        self._tell_to_stop()  # before a word: a terminal that is gone or held may take none
        say("stopping: waiting for the workers to save; Ctrl-C, once more, ends them at once")
        return None

    def _tell_to_stop(self) -> None:
        """SIGTERM to the workers, once."""
        if self._team is not None and not self._told_to_stop:
            self._told_to_stop = True
            self._team.send(signal.SIGTERM)


@contextlib.contextmanager
def _caught() -> Iterator[int]:
    """A descriptor that gives the numbers of the signals that are for the launcher."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {n: signal.signal(n, lambda *_: None) for n in caught_signals()}
    if signal.getsignal(signal.SIGUSR1) is not signal.SIG_IGN:
        signal.signal(signal.SIGUSR1, lambda *_: None)  # for good: it must never end a launch
    waker = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(waker)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    """A pipe's reading and writing end."""
    reading, writing = os.pipe()
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
