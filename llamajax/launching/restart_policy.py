"""Decide for all nodes when an attempt starts, when it ends, and whether another one follows.

Runs in the launcher of node 0. It sees no sockets and no processes: messages of the launchers come
in, orders for all of them go out. Both are dicts of JSON.
"""

from collections.abc import Sequence

from llamajax.errors import ExitCode, restart_helps
from llamajax.launching.launch_options import LaunchOptions
from llamajax.processes.line_protocol import Message

# By the value of `say`: what a launcher reports. step: of the newest complete checkpoint.
MESSAGES = {
    "ready": {"attempt": int, "nodes": int, "processes_per_node": int},
    "failed": {"attempt": int, "code": int, "why": str, "lines": list},
    "ended": {"attempt": int, "code": int},
    "stopping": {},
    "checkpoint": {"step": int},
}
# By the value of `order`: what all launchers are to do. again_in_s: None means to exit.
_SECONDS = (int, float, type(None))
ORDERS = {
    "start": {"attempt": int},
    "stop": {},
    "end": {"code": int, "why": str, "lines": list, "then": str, "again_in_s": _SECONDS},
}
_LONGEST_WAIT_S = 60.0
_MOST_DOUBLINGS = 30  # a float holds no more than a thousand of them


class RestartPolicy:
    """Call the `on_` methods in turn; each returns orders for all nodes.

    `options.max_restarts` counts failed attempts in a row without progress. An attempt made
    progress when it completed a checkpoint newer than any before; the first one that it reports is
    where it started. A command that reports nothing makes none.
    """

    def __init__(self, options: LaunchOptions, *, now: float):
        """now: here and below, seconds of a monotonic clock."""
        self._options = options
        self.attempt, self.without_progress = -1, 0
        self._running = self._stopping = False
        self._ready: dict[int, int] = {}  # next free attempt number by node
        self._ended: dict[int, int] = {}  # exit code by node
        self._newest = -1  # checkpoint before this attempt
        self._reported: list[int] = []  # checkpoints of this attempt, as they came
        self._deadline = now + options.timeout_s

    def on_message(self, node: int, message: Message, now: float) -> list[Message]:
        """Return the orders that follow from a message of one node."""
        of_this_attempt = self._running and message.get("attempt") == self.attempt
        match message["say"]:
            case "ready" if not self._running:
                return self._on_ready(node, message)
            case "failed" if of_this_attempt:
                return self._on_failed(message["code"], message["why"], message["lines"], now)
            case "ended" if of_this_attempt:
                return self._on_ended(node, message["code"])
            case "stopping" if not self._stopping:
                self._stopping = True
                return [{"order": "stop"} if self._running else end(ExitCode.STOPPED, "stopped")]
            case "checkpoint":
                self._reported.append(message["step"])
        return []

    def on_disconnect(self, node: int, now: float) -> list[Message]:
        """Return the orders that follow from the loss of a node's launcher."""
        self._ready.pop(node, None)
        if not self._running or node in self._ended:
            return []
        return self._on_failed(ExitCode.FAILED, f"the launcher of node {node} is gone", [], now)

    def on_time(self, now: float) -> list[Message]:
        """Return the orders that follow from the time that passed."""
        if self._running or now < self._deadline:
            return []
        nodes = self._options.nodes
        absent = ", ".join(str(node) for node in range(nodes) if node not in self._ready)
        why = (
            f"of {nodes} nodes {len(self._ready)} came within --timeout_s = "
            f"{self._options.timeout_s:g}; missing: node {absent}. Start the same command there, "
            "with its own --node_rank"
        )
        return [end(ExitCode.TRANSIENT, why)]

    def _on_ready(self, node: int, message: Message) -> list[Message]:
        names = ("nodes", "processes_per_node")
        theirs = " ".join(f"--{name}={message[name]}" for name in names)
        ours = " ".join(f"--{name}={getattr(self._options, name)}" for name in names)
        if theirs != ours:
            why = f"node {node} was launched with {theirs}, node 0 with {ours}: use the same"
            return [end(ExitCode.USER_ERROR, why)]
        self._ready[node] = message["attempt"]
        if len(self._ready) < self._options.nodes:
            return []
        self.attempt = max(self.attempt + 1, *self._ready.values())
        self._running, self._ended = True, {}
        self._newest, self._reported = max([self._newest, *self._reported]), []
        return [{"order": "start", "attempt": self.attempt}]

    def _on_failed(self, code: int, why: str, lines: list[str], now: float) -> list[Message]:
        self._running, self._ready = False, {}
        newest = max(self._reported, default=-1)
        progressed = newest > max([self._newest, *self._reported[:1]])
        self.without_progress = 0 if progressed else self.without_progress + 1
        again_in_s, then, most = None, "", self._options.max_restarts
        if self._stopping:
            code = ExitCode.STOPPED
        elif not restart_helps(code):
            then = f"not started again: after code {code} that would not help"
        elif most == 0 or self.without_progress > most:
            then = f"given up: {self.without_progress} failures without progress"
        else:
            doublings = min(max(self.without_progress - 1, 0), _MOST_DOUBLINGS)
            again_in_s = min(self._options.backoff_s * 2**doublings, _LONGEST_WAIT_S)
            self._deadline = now + again_in_s + self._options.timeout_s
            which = f"restart {self.without_progress} of {most} without progress"
            if progressed:
                which = f"checkpoint {newest} was reached: this failure does not count"
            then = f"starting all workers again in {again_in_s:g} s ({which})"
        return [end(code, why, lines=lines, again_in_s=again_in_s, then=then)]

    def _on_ended(self, node: int, code: int) -> list[Message]:
        self._ended[node] = code
        if len(self._ended) == self._options.nodes:
            if ExitCode.STOPPED in self._ended.values():
                return [end(ExitCode.STOPPED, "stopped")]
            return [end(ExitCode.FINISHED, "finished")]
        if code == ExitCode.STOPPED and not self._stopping:
            self._stopping = True
            return [{"order": "stop"}]
        return []


def end(
    code: int,
    why: str,
    *,
    lines: Sequence[str] = (),
    again_in_s: float | None = None,
    then: str = "",
) -> Message:
    """Return the order to end the workers, and to exit with `code` unless `again_in_s` is set."""
    return {
        "order": "end",
        "code": code,
        "why": why,
        "lines": list(lines),
        "again_in_s": again_in_s,
        "then": then,
    }
