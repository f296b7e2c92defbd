"""Run the workers of one node as node 0 orders, and tell node 0 what happens to them."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.connection import wait

from llamajax import errors
from llamajax.errors import ExitCode, UserError
from llamajax.files import write_problem
from llamajax.launching.launch_options import LaunchOptions
from llamajax.launching.node_protocol import NodeClient, NodeServer
from llamajax.launching.worker_logs import next_attempt
from llamajax.launching.workers import WorkerGroup, exit_code, first_failed
from llamajax.processes.line_protocol import Message
from llamajax.verbs import STOP_SIGNALS, caught_signals

_LOOK_EVERY_S = 0.1
_SHOWN_LINES = 20
_STACKS_WITHIN_S = 1.0


def launch(options: LaunchOptions) -> int:
    """Run the command on all workers until it has finished or stopped, or cannot be restarted.

    Returns the exit code. Raises UserError when the directory of the logs cannot be written.
    """
    if problem := write_problem(options.logs):
        raise UserError(
            f"--log_dir={options.logs}: {problem}; choose a directory that can be written"
        )
    node = NodeClient(options) if options.node_rank else NodeServer(options)
    with contextlib.closing(node), _signals() as signals, _pipe() as parent, _pipe() as reports:
        os.set_blocking(reports[1], False)  # a worker never waits for its launcher
        launcher = Launcher(options, node, parent_pipe=parent[0], reports=reports)
        try:
            return launcher.run(signals)
        finally:
            launcher.end_workers()


def say(text: str) -> None:
    """Print a line of the launcher's own."""
    errors.say(f"launch: {text}")


class Launcher:
    """The launcher of one node."""

    def __init__(
        self,
        options: LaunchOptions,
        node: NodeServer | NodeClient,
        *,
        parent_pipe: int,
        reports: tuple[int, int],
    ):
        """node: connects to the launchers of the other nodes.

        parent_pipe: reading end of a pipe, which the workers inherit and which ends with this
        process. reports: both ends of the pipe on which worker 0 reports its checkpoints.
        """
        self._options, self._node = options, node
        self._parent_pipe, self._reports = parent_pipe, reports
        self._workers: WorkerGroup | None = None
        self._again_at: float | None = None
        self._asked_to_stop = False

    def run(self, signals: int) -> int:
        """Return the exit code. signals: descriptor that yields the number of each signal."""
        self._say_ready()
        while True:
            self._report_checkpoints()
            for order in self._node.orders():
                code = self._obey(order)
                if code is not None:
                    return code
            if self._again_at is not None and time.monotonic() >= self._again_at:
                self._again_at = None
                self._say_ready()
            if self._workers is not None:
                self._watch_workers(self._workers)
            wakers = [signals, *self._node.wakers]
            wakers += self._workers.wakers if self._workers else []
            if signals in wait(wakers, _LOOK_EVERY_S):
                numbers = os.read(signals, 64)
                if signal.SIGUSR1 in numbers and self._workers is not None:
                    self._workers.ask_for_stacks()
                    say("the workers write their stacks to their logs")
                code = self._stop(numbers) if set(numbers) & set(STOP_SIGNALS) else None
                if code is not None:
                    return code

    def end_workers(self) -> None:
        """Kill the workers that still run."""
        if self._workers is not None:
            self._workers.end()
            self._workers = None

    def _say_ready(self) -> None:
        options = self._options
        self._node.say(
            {
                "say": "ready",
                "attempt": next_attempt(options.logs, options.ranks),
                "nodes": options.nodes,
                "processes_per_node": options.processes_per_node,
            }
        )

    def _obey(self, order: Message) -> int | None:
        """Carry out an order of node 0. Return the exit code when that is to exit."""
        match order["order"]:
            case "start":
                self._start(order["attempt"])
            case "stop" if self._workers is not None:
                self._workers.stop()
            case "end":
                self.end_workers()
                say(order["why"])
                for line in order["lines"]:
                    errors.say(f"  | {line}")
                if order["then"]:
                    say(order["then"])
                if order["again_in_s"] is None:
                    return order["code"]
                self._again_at = time.monotonic() + order["again_in_s"]
        return None

    def _start(self, attempt: int) -> None:
        options, address = self._options, self._options.address
        if address is None:  # one node: a free port for each attempt
            with socket.create_server(("127.0.0.1", 0)) as free:
                address = free.getsockname()
        self._workers = WorkerGroup(
            options,
            attempt=attempt,
            address=f"{address[0]}:{address[1]}",
            parent_pipe=self._parent_pipe,
            reports=self._reports[1],
        )
        ranks, pids = options.ranks, ", ".join(map(str, self._workers.pids))
        say(
            f"attempt {attempt}: workers {ranks[0]} to {ranks[-1]} of {options.num_processes} "
            f"started (pids {pids}), logs in {options.logs}"
        )

    def _report_checkpoints(self) -> None:
        """Tell node 0 which checkpoints are complete. Call it before reporting a failure."""
        reading = self._reports[0]
        if wait([reading], 0):
            for step in os.read(reading, 1 << 16).split():
                self._node.say({"say": "checkpoint", "step": int(step)})

    def _watch_workers(self, workers: WorkerGroup) -> None:
        """Show the output of worker 0, and report workers that ended or make no progress."""
        workers.echo()
        ended = workers.ended()
        failed = {r: c for r, c in ended.items() if c and exit_code(c) != ExitCode.STOPPED}
        # One that SIGTERM killed outright stopped, if it was told to; else somebody killed it.
        if not workers.told_to_stop and ExitCode.STOPPED not in ended.values():
            failed |= {r: c for r, c in ended.items() if c == -signal.SIGTERM}
        if workers.reported:
            return
        if failed:
            rank = first_failed(failed)
            code = failed[rank]
            killed = f"was killed by {signal.Signals(-code).name}" if code < 0 else ""
            what = f"worker {rank} {killed or f'failed: code {code}'}"
            self._report_failure(workers, rank, exit_code(code), what)
        elif ended and not workers.running:
            workers.reported = True
            code = ExitCode.STOPPED if ExitCode.STOPPED in workers.codes else 0
            self._node.say({"say": "ended", "attempt": workers.attempt, "code": code})
        elif ExitCode.STOPPED in ended.values():
            self._node.say({"say": "stopping"})
        elif workers.idle_s() > self._options.timeout_s:
            rank, until_s = workers.running[0], time.monotonic() + _STACKS_WITHIN_S
            workers.send(signal.SIGUSR1)  # workers of ours write the stacks of their threads
            # The signal ends others, whose end must not cut that short.
            while workers.running and (left_s := until_s - time.monotonic()) > 0:
                wait(workers.wakers, left_s)
                workers.ended()
            what = f"no progress within {self._options.timeout_s:g} s"
            self._report_failure(workers, rank, ExitCode.STALLED, what)

    def _report_failure(self, workers: WorkerGroup, rank: int, code: int, what: str) -> None:
        self._report_checkpoints()
        workers.reported = True
        log, lines = workers.log(rank), workers.last_lines(rank, _SHOWN_LINES)
        node = f" (node {self._options.node_rank})" if self._options.nodes > 1 else ""
        rest = f"the last lines of {log}:" if lines else f"{log} is empty"
        self._node.say(
            {
                "say": "failed",
                "attempt": workers.attempt,
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
        self._node.say({"say": "stopping"})
        if self._workers is None or (again and signal.SIGINT in numbers):
            self.end_workers()
            say("stopped at once")
            return ExitCode.STOPPED
        if not again:
            self._workers.stop()  # first: a terminal that is gone or held up may block the print
            say("stopping: waiting for the workers to save; Ctrl-C, once more, ends them at once")
        return None


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """Catch the launcher's signals. Yields a descriptor that gives the number of each."""
    with _pipe() as (reading, writing):
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


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    """Open a pipe. Yields its reading and its writing end."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)
