"""One verdict for all nodes: when an attempt starts, when it ends, whether another follows.

Lives in the launcher of node 0. It sees no sockets and no processes: what the launchers say comes
in, orders for all of them go out. Both are dicts of JSON:

    said     ready (attempt, nodes, processes_per_node) | failed (attempt, code, why, lines)
             | ended (attempt, code) | stopping
    ordered  start (attempt) | stop | end (code, why, lines, again_in_s; None: leave)
"""

import dataclasses
from typing import Any

from llamajax.supervision.workers import STOPPED

USER_ERROR = 2
_LONGEST_WAIT_S = 60.0

Message = dict[str, Any]


@dataclasses.dataclass(kw_only=True)
class Referee:
    """Call `hear`, `lose` and `tick` in turn; each returns orders for all nodes.

    timeout_s: how long an attempt waits for its nodes. now: seconds of a monotonic clock.
    """

    nodes: int
    processes_per_node: int
    max_restarts: int
    backoff_s: float
    timeout_s: float
    now: float
    restarts: int = 0
    attempt: int = -1
    running: bool = False
    stopping: bool = False

    def __post_init__(self) -> None:
        self._ready: dict[int, int] = {}
        self._ended: dict[int, int] = {}
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
                return [{"order": "stop"}] if self.running else [leave(STOPPED, "stopped")]
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
                USER_ERROR,
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
                    USER_ERROR,
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
        return [{"order": "start", "attempt": self.attempt}]

    def _on_failed(self, message: Message, now: float) -> list[Message]:
        self.running, self._ready = False, {}
        code, again_in_s = message["code"], None
        if self.stopping:
            code = STOPPED
        elif code != USER_ERROR and self.restarts < self.max_restarts:
            again_in_s = min(self.backoff_s * 2**self.restarts, _LONGEST_WAIT_S)
            self.restarts += 1
            self._deadline = now + again_in_s + self.timeout_s
        return [
            {
                "order": "end",
                "code": code,
                "why": message["why"],
                "lines": message["lines"],
                "again_in_s": again_in_s,
                "restart": f"{self.restarts} of {self.max_restarts}",
            }
        ]

    def _on_ended(self, node: int, code: int) -> list[Message]:
        self._ended[node] = code
        if len(self._ended) == self.nodes:
            stopped = STOPPED in self._ended.values()
            return [leave(STOPPED, "stopped") if stopped else leave(0, "finished")]
        if code == STOPPED and not self.stopping:
            self.stopping = True
            return [{"order": "stop"}]
        return []


def leave(code: int, why: str) -> Message:
    """The order to end the workers and exit."""
    return {"order": "end", "code": code, "why": why, "lines": [], "again_in_s": None}
