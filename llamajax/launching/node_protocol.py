"""Launchers of several nodes talk: lines of JSON over TCP, the launcher of node 0 in the middle.

`Hub` is node 0's side and asks the `Referee`; `Spoke` is that of every other node. Both have `say`
(what this node has to tell) and `orders` (what all nodes are to do), and never block for long.
"""

import contextlib
import errno
import json
import select
import socket
import time
from typing import Any

from llamajax.errors import ExitCode, TransientError, UserError
from llamajax.launching.launch_options import Request
from llamajax.launching.restart_policy import Message, Referee, leave

_BEAT_EVERY_S = 2.0
_SILENT_S = 20.0  # of a node that lost power: no connection is ever closed
_SEND_WITHIN_S = 5.0
_RETRY_EVERY_S = 0.5
_HANG_UP_S = 1.0
_MAX_LINE_BYTES = 1 << 20


class Line:
    """One connection: messages in both directions, and whether the other side is still there."""

    def __init__(self, connection: socket.socket):
        self._socket, self._text = connection, b""
        self._socket.settimeout(_SEND_WITHIN_S)
        self._heard_at = self._beat_at = time.monotonic()
        self.alive = True

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send one message; a broken connection is seen by `alive`."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.alive = False

    def receive(self) -> list[Message]:
        """The messages that arrived; notices the end, and silence."""
        now = time.monotonic()
        try:
            while self.alive and select.select([self._socket], [], [], 0)[0]:
                part = self._socket.recv(1 << 16)
                self.alive = bool(part) and len(self._text) < _MAX_LINE_BYTES
                self._text, self._heard_at = self._text + part, now
        except OSError:
            self.alive = False
        *whole, self._text = self._text.split(b"\n")
        if now - self._beat_at > _BEAT_EVERY_S:
            self._beat_at = now
            self.send({"say": "beat"})
        if now - self._heard_at > _SILENT_S:
            self.alive = False
        return [message for message in map(_decode, whole) if message is not None]

    def close(self) -> None:
        """Hang up; waits a moment for the other side to do so, or its last orders could be lost:
        the kernel throws away what was sent when a socket is closed before it was read empty."""
        with contextlib.suppress(OSError):
            if self.alive:
                self._socket.shutdown(socket.SHUT_WR)
                self._socket.settimeout(_HANG_UP_S)
                while self._socket.recv(1 << 16):
                    pass
        self._socket.close()


def _decode(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        value = json.loads(line)
        if isinstance(value, dict) and value.keys() & {"say", "order"}:
            return value
    return None


class Hub:
    """Node 0: hears all nodes, itself included, and tells them what the referee decides."""

    def __init__(self, request: Request):
        self._referee = Referee(
            nodes=request.nodes,
            processes_per_node=request.processes_per_node,
            max_restarts=request.max_restarts,
            backoff_s=request.backoff_s,
            timeout_s=request.timeout_s,
            now=time.monotonic(),
        )
        self._orders: list[Message] = []
        self._lines: dict[int, Line] = {}
        self._strangers: list[Line] = []
        self._listener = _listen(request.coordinator[1] + 1) if request.nodes > 1 else None

    @property
    def wakers(self) -> list[Any]:
        """What becomes readable when there is news."""
        listener = [] if self._listener is None else [self._listener]
        return [*listener, *self._lines.values(), *self._strangers]

    def say(self, message: Message) -> None:
        """What node 0 itself has to tell."""
        self._announce(self._referee.hear(0, message, time.monotonic()))

    def orders(self) -> list[Message]:
        """Orders for this node since the last call."""
        if self._listener is not None:
            self._meet()
            for node, line in list(self._lines.items()):
                for message in (m for m in line.receive() if "say" in m):
                    self._announce(self._referee.hear(node, message, time.monotonic()))
                if not line.alive:
                    self._lines.pop(node).close()
                    self._announce(self._referee.lose(node, time.monotonic()))
        self._announce(self._referee.tick(time.monotonic()))
        found, self._orders = self._orders, []
        return found

    def close(self) -> None:
        for line in (*self._lines.values(), *self._strangers):
            line.close()
        if self._listener is not None:
            self._listener.close()

    def _announce(self, orders: list[Message]) -> None:
        for order in orders:
            self._orders.append(order)
            for line in self._lines.values():
                line.send(order)

    def _meet(self) -> None:
        """Let launchers in; the first message of each says which node it is."""
        while select.select([self._listener], [], [], 0)[0]:
            self._strangers.append(Line(self._listener.accept()[0]))
        for line in list(self._strangers):
            messages = line.receive()
            if not messages and line.alive:
                continue
            self._strangers.remove(line)
            messages = [message for message in messages if "say" in message]
            node = messages[0].get("node") if messages else None
            if node in self._lines:
                why = f"there is a launcher of node {node} already: give each its own --node_rank"
                line.send(leave(ExitCode.USER_ERROR, why))
            elif isinstance(node, int) and line.alive:
                self._lines[node] = line
                for message in messages:
                    self._announce(self._referee.hear(node, message, time.monotonic()))
                continue
            line.close()


class Spoke:
    """Another node: reports to node 0 and obeys; without it, waits for a new one."""

    def __init__(self, request: Request):
        self._place = (request.coordinator[0].strip("[]"), request.coordinator[1] + 1)
        self._node, self._timeout_s = request.node_rank, request.timeout_s
        self._line: Line | None = None
        self._ready: Message | None = None
        self._deadline = time.monotonic() + request.timeout_s
        self._tried_at = 0.0

    @property
    def wakers(self) -> list[Any]:
        """What becomes readable when there is news."""
        return [] if self._line is None else [self._line]

    def say(self, message: Message) -> None:
        """Tell node 0; `ready` is repeated to a node 0 that comes later."""
        message = message | {"node": self._node}
        if message["say"] == "ready":
            self._ready, self._deadline = message, time.monotonic() + self._timeout_s
        if self._line is not None:
            self._line.send(message)

    def orders(self) -> list[Message]:
        """Orders since the last call; `end` when node 0 is gone or does not come."""
        if self._line is None:
            return self._connect()
        found = [m for m in self._line.receive() if "order" in m]
        if any(m["order"] == "start" for m in found):
            self._ready = None
        if not self._line.alive:
            self._line.close()
            self._line, self._deadline = None, time.monotonic() + self._timeout_s
            if not any(m["order"] == "end" for m in found) and self._ready is None:
                why = "the launcher of node 0 is gone; waiting for it to come back"
                found.append({"order": "end", "code": 1, "why": why, "lines": []})
                found[-1] |= {"again_in_s": 0.0, "then": ""}
        return found

    def close(self) -> None:
        if self._line is not None:
            self._line.close()

    def _connect(self) -> list[Message]:
        now = time.monotonic()
        if now > self._deadline:
            why = (
                f"no launcher of node 0 at {self._place[0]}:{self._place[1]} within --timeout_s = "
                f"{self._timeout_s:g}: start it there, or correct --coordinator"
            )
            return [leave(ExitCode.TRANSIENT, why)]
        if now - self._tried_at > _RETRY_EVERY_S and self._ready is not None:
            self._tried_at = now
            with contextlib.suppress(OSError):
                self._line = Line(socket.create_connection(self._place, timeout=_SEND_WITHIN_S))
                self._line.send(self._ready)
        return []


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        kind = TransientError if error.errno == errno.EADDRINUSE else UserError
        raise kind(
            f"the launcher cannot listen on port {port} (that of --coordinator + 1): "
            f"{error.strerror}; choose another, or end the launcher that runs already"
        ) from None
