"""What the launchers of several nodes tell each other: the launcher of node 0 in the middle.

`NodeServer` is node 0's side and asks the `RestartPolicy`; `NodeClient` is that of every other
node. Both have `say` (report what happened on this node) and `orders` (what all nodes are to do),
and never block for long.
"""

import time
from typing import Any

from llamajax.errors import ExitCode
from llamajax.launching.launch_options import LaunchOptions
from llamajax.launching.restart_policy import MESSAGES, ORDERS, RestartPolicy, end
from llamajax.processes.line_protocol import (
    Connection,
    Listener,
    Message,
    connect,
    has_fields,
    why_unreachable,
)

_RETRY_EVERY_S = 0.5


class NodeServer:
    """Node 0: passes what all nodes say, itself included, to the policy, and its orders to all."""

    def __init__(self, options: LaunchOptions):
        self._policy = RestartPolicy(options, now=time.monotonic())
        self._orders: list[Message] = []
        self._nodes: dict[int, Connection] = {}
        self._listener = None
        if options.nodes > 1:
            self._listener = Listener(
                options.address[1] + 1,
                who="the launcher",
                fix="choose another --coordinator, whose port + 1 the launchers use, or end the "
                "launcher that runs already",
            )

    @property
    def wakers(self) -> list[Any]:
        """What becomes readable when there is news."""
        return [*self._nodes.values(), *(self._listener.wakers if self._listener else ())]

    def say(self, message: Message) -> None:
        """Report what happened on node 0 itself."""
        self._announce(self._policy.on_message(0, message, time.monotonic()))

    def orders(self) -> list[Message]:
        """Return the orders for this node since the last call."""
        if self._listener is not None:
            for connection, messages in self._listener.accept():
                self._admit(connection, messages)
            for node, connection in list(self._nodes.items()):
                self._pass_on(node, connection.receive())
                connection.beat()
                if not connection.alive:
                    self._nodes.pop(node).close()
                    self._announce(self._policy.on_disconnect(node, time.monotonic()))
        self._announce(self._policy.on_time(time.monotonic()))
        found, self._orders = self._orders, []
        return found

    def close(self) -> None:
        for connection in self._nodes.values():
            connection.close()
        if self._listener is not None:
            self._listener.close()

    def _admit(self, connection: Connection, messages: list[Message]) -> None:
        """Take in a launcher; the first message of each says which node it is."""
        first = messages[0]
        if not (has_fields(first, {"node": int}) and first["node"] > 0 and _is_message(first)):
            connection.drop()
        elif first["node"] in self._nodes:
            why = f"there is a launcher of node {first['node']} already: give each its own rank"
            connection.send(end(ExitCode.USER_ERROR, f"{why} (--node_rank)"))
            connection.close()
        else:
            self._nodes[first["node"]] = connection
            self._pass_on(first["node"], messages)

    def _pass_on(self, node: int, messages: list[Message]) -> None:
        for message in filter(_is_message, messages):
            self._announce(self._policy.on_message(node, message, time.monotonic()))

    def _announce(self, orders: list[Message]) -> None:
        self._orders += orders
        for order in orders:
            for connection in self._nodes.values():
                connection.send(order)


class NodeClient:
    """Another node: reports to node 0 and obeys; without it, waits for a new one."""

    def __init__(self, options: LaunchOptions):
        self._host, port = options.address
        self._port = port + 1
        self._node, self._timeout_s = options.node_rank, options.timeout_s
        self._connection: Connection | None = None
        self._ready: Message | None = None  # to be repeated to a node 0 that comes later
        self._deadline = time.monotonic() + options.timeout_s
        self._tried_at = 0.0
        self._unreachable: OSError | None = None  # why the last try to connect failed

    @property
    def wakers(self) -> list[Any]:
        """What becomes readable when there is news."""
        return [] if self._connection is None else [self._connection]

    def say(self, message: Message) -> None:
        """Tell node 0 what happened on this node."""
        message = message | {"node": self._node}
        if message["say"] == "ready":
            self._ready, self._deadline = message, time.monotonic() + self._timeout_s
        if self._connection is not None:
            self._connection.send(message)

    def orders(self) -> list[Message]:
        """Return the orders since the last call; `end` when node 0 is gone or does not come."""
        if self._connection is None:
            return self._connect()
        received = self._connection.receive()
        found = [m for m in received if has_fields(m, ORDERS.get(str(m.get("order"))))]
        if any(message["order"] == "start" for message in found):
            self._ready = None
        self._connection.beat()
        if not self._connection.alive:
            self._connection.close()
            if self._connection.heard:  # else it is no launcher that listens there
                self._deadline = time.monotonic() + self._timeout_s
            self._connection = None
            if not any(message["order"] == "end" for message in found) and self._ready is None:
                why = "the launcher of node 0 is gone; waiting for it to come back"
                found.append(end(ExitCode.FAILED, why, again_in_s=0.0))
        return found

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _connect(self) -> list[Message]:
        now = time.monotonic()
        if now > self._deadline:
            why = (
                f"no launcher of node 0 at {self._host}:{self._port} (--coordinator's port + 1) "
                f"within --timeout_s = {self._timeout_s:g}: "
                f"{why_unreachable(self._unreachable, self._host, self._port)}"
            )
            return [end(ExitCode.TRANSIENT, why)]
        if now - self._tried_at > _RETRY_EVERY_S and self._ready is not None:
            self._tried_at = now
            try:
                self._connection, self._unreachable = connect(self._host, self._port), None
            except OSError as error:
                self._unreachable = error
            else:
                self._connection.send(self._ready)
        return []


def _is_message(message: Message) -> bool:
    return has_fields(message, MESSAGES.get(str(message.get("say"))))
