"""One verdict for all nodes: when an attempt starts, when it ends, whether another follows.

Lives in the launcher of node 0. It sees no sockets and no processes: what the launchers say comes
in, orders for all of them go out. Both are dicts of JSON:

    said     ready (attempt, nodes, processes_per_node) | failed (attempt, code, why, lines)
             | ended (attempt, code) | stopping | checkpoint (step: the newest complete one)
    ordered  start (attempt) | stop | end (code, why, lines, then; again_in_s, None: leave)
"""

import dataclasses
from typing import Any

from llamajax.errors import ExitCode, restart_helps

_LONGEST_WAIT_S = 60.0
_MOST_DOUBLINGS = 30  # a float holds no more than a thousand of them

Message = dict[str, Any]


@dataclasses.dataclass(kw_only=True)
class Referee:
    """Call `hear`, `lose` and `tick` in turn; each returns orders for all nodes.

    timeout_s: how long an attempt waits for its nodes. now: seconds of a monotonic clock.
    max_restarts: failed attempts in a row without progress after which another one follows. An
    attempt made progress when it completed a checkpoint newer than any before; what a worker
    reports first is where it started. A command that reports nothing makes none.
    """

    nodes: int
    processes_per_node: int
    max_restarts: int
    backoff_s: float
    timeout_s: float
    now: float
    without_progress: int = 0
    attempt: int = -1
    running: bool = False
    stopping: bool = False

    def __post_init__(self) -> None:
        self._ready: dict[int, int] = {}
        self._ended: dict[int, int] = {}
        self._newest, self._has_reported, self._progressed = -1, False, False
        self._deadline = self.now + self.timeout_s

    def hear(self, node: int, message: Message, now: float) -> list[Message]:
        """What follows from the words of one node."""
        match message["say"]:
            case "ready" if not self.running:
                return self._on_ready(node, message)
            case "failed" if self.running and message["attempt"] == self.attempt:
                return self._on_failed(message, now)
            case "ended" if self.running and message["attempt"] == self.attempt:
                return self._on_ended(node, message["code"])
            case "stopping" if not self.stopping:
                self.stopping = True
                stop = {"order": "stop"}
                return [stop if self.running else leave(ExitCode.STOPPED, "stopped")]
            case "checkpoint":
                newer = message["step"] > self._newest
                self._progressed |= newer and self._has_reported
                self._newest = max(message["step"], self._newest)
                self._has_reported = True
        return []

    def lose(self, node: int, now: float) -> list[Message]:
        """A node's launcher is gone."""
        self._ready.pop(node, None)
        if not self.running or node in self._ended:
            return []
        why = f"the launcher of node {node} is gone"
        return self._on_failed({"code": 1, "why": why, "lines": []}, now)

    def tick(self, now: float) -> list[Message]:
        """What follows from the time that passed."""
        if self.running or now < self._deadline:
            return []
        absent = [str(node) for node in range(self.nodes) if node not in self._ready]
        return [
            leave(
                ExitCode.TRANSIENT,
                f"of {self.nodes} nodes {len(self._ready)} came within --timeout_s = "
                f"{self.timeout_s:g}; missing: node {', '.join(absent)}. Start the same command "
                "there, with its own --node_rank",
            )
        ]

    def _on_ready(self, node: int, message: Message) -> list[Message]:
        theirs = message["nodes"], message["processes_per_node"]
        if theirs != (self.nodes, self.processes_per_node):
            return [
                leave(
                    ExitCode.USER_ERROR,
                    f"node {node} was launched with --nodes={theirs[0]} "
                    f"--processes_per_node={theirs[1]}, node 0 with --nodes={self.nodes} "
                    f"--processes_per_node={self.processes_per_node}: use the same",
                )
            ]
        self._ready[node] = message["attempt"]
        if len(self._ready) < self.nodes:
            return []
        self.attempt = max(self.attempt + 1, *self._ready.values())
        self.running, self._ended = True, {}
        self._has_reported = self._progressed = False
        return [{"order": "start", "attempt": self.attempt}]

    def _on_failed(self, message: Message, now: float) -> list[Message]:
        self.running, self._ready = False, {}
        self.without_progress = 0 if self._progressed else self.without_progress + 1
        code, again_in_s, then = message["code"], None, ""
        most = self.max_restarts
        if self.stopping:
            code = ExitCode.STOPPED
        elif not restart_helps(code):
            then = f"not started again: after code {code} that would not help"
        elif most == 0 or self.without_progress > most:
            then = f"given up: {self.without_progress} failures without progress"
        else:
            doublings = min(max(self.without_progress - 1, 0), _MOST_DOUBLINGS)
            again_in_s = min(self.backoff_s * 2**doublings, _LONGEST_WAIT_S)
            self._deadline = now + again_in_s + self.timeout_s
            which = f"restart {self.without_progress} of {most} without progress"
            if self._progressed:
                which = f"checkpoint {self._newest} was reached: this failure does not count"
            then = f"starting all workers again in {again_in_s:g} s ({which})"
        return [
            {
                "order": "end",
                "code": code,
                "why": message["why"],
                "lines": message["lines"],
                "again_in_s": again_in_s,
                "then": then,
            }
        ]

    def _on_ended(self, node: int, code: int) -> list[Message]:
        self._ended[node] = code
        if len(self._ended) == self.nodes:
            if ExitCode.STOPPED in self._ended.values():
                return [leave(ExitCode.STOPPED, "stopped")]
            return [leave(ExitCode.FINISHED, "finished")]
        if code == ExitCode.STOPPED and not self.stopping:
            self.stopping = True
            return [{"order": "stop"}]
        return []


def leave(code: int, why: str) -> Message:
    """The order to end the workers and exit."""
    return {"order": "end", "code": code, "why": why, "lines": [], "again_in_s": None, "then": ""}
