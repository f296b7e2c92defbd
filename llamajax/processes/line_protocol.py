"""JSON lines over TCP, as the roll call and the launchers of several nodes speak them.

One object a line, in both directions. Whatever else connects to the port (a port scanner, a health
check) or stays silent is dropped and disturbs nobody: `Listener` and `has_fields` see to it.
"""

import contextlib
import errno
import json
import socket
import time
from collections.abc import Mapping
from multiprocessing.connection import wait
from typing import Any

from llamajax.errors import TransientError, UserError

_SEND_WITHIN_S = 5.0
_IDENTIFY_WITHIN_S = 5.0  # from connecting to the first whole line
_BEAT_EVERY_S = 2.0
_SILENT_S = 20.0  # a peer that lost power never closes its connection
_HANG_UP_S = 1.0
_BACKLOG = 1024
_MAX_LINE_BYTES = 1 << 20

Message = dict[str, Any]


def has_fields(message: Message, fields: Mapping[str, type | tuple[type, ...]] | None) -> bool:
    """Return whether a message has these fields, of exactly these types. fields: None has none."""
    if fields is None:
        return False
    kinds = {name: kind if isinstance(kind, tuple) else (kind,) for name, kind in fields.items()}
    return all(name in message and type(message[name]) in kinds[name] for name in kinds)


class Connection:
    """Messages to and from one peer. `alive` turns false when it hung up, broke or sent no JSON.

    heard: whether any message came.
    """

    def __init__(self, connected: socket.socket):
        self._socket, self._unread = connected, b""
        self._socket.settimeout(_SEND_WITHIN_S)
        self.opened_at = self._received_at = self._beat_at = time.monotonic()
        self.alive, self.heard = True, False

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send one message; a failure shows in `alive`."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.alive = False

    def receive(self, within_s: float = 0.0) -> list[Message]:
        """Return the messages that arrived. within_s: how long to wait for the first."""
        found: list[Message] = []
        deadline = time.monotonic() + within_s
        while self.alive and wait([self._socket], 0 if found else deadline - time.monotonic()):
            try:
                part = self._socket.recv(1 << 16)
            except OSError:
                part = b""
            *lines, self._unread = (self._unread + part).split(b"\n")
            self.alive = bool(part) and len(self._unread) < _MAX_LINE_BYTES
            self._received_at = time.monotonic()
            try:
                messages = [json.loads(line) for line in lines]
            except (ValueError, RecursionError):
                messages = [None]
            objects = [message for message in messages if isinstance(message, dict)]
            self.alive &= len(objects) == len(messages)
            self.heard |= bool(objects)
            found += [message for message in objects if "beat" not in message]
        return found

    def beat(self) -> None:
        """Show the peer that this side is there, and look whether the peer shows the same.

        To be called several times a second on both sides of a connection that stays open.
        """
        now = time.monotonic()
        if now - self._beat_at > _BEAT_EVERY_S:
            self._beat_at = now
            self.send({"beat": True})
        self.alive &= now - self._received_at < _SILENT_S

    def close(self, *, after_peer: bool = False) -> None:
        """Hang up once the peer has read everything: closing earlier may discard what was sent.

        Waits a second at most. after_peer: let the peer close first, which leaves this side's port
        free for the next listener.
        """
        deadline = time.monotonic() + _HANG_UP_S
        with contextlib.suppress(OSError):
            if self.alive and not after_peer:
                self._socket.shutdown(socket.SHUT_WR)
            while self.alive and wait([self._socket], deadline - time.monotonic()):
                self.alive = bool(self._socket.recv(1 << 16)) and time.monotonic() < deadline
        self.drop()

    def drop(self) -> None:
        """Hang up at once, whatever the peer has read."""
        self._socket.close()


def connect(host: str, port: int, *, timeout_s: float = _SEND_WITHIN_S) -> Connection:
    """Connect to a `Listener`. host: a name or an address, IPv6 in brackets. Raises OSError."""
    return Connection(socket.create_connection((host.strip("[]"), port), timeout=timeout_s))


def why_unreachable(error: OSError | None, host: str, port: int) -> str:
    """Say why nobody was reached at an address, and what to correct.

    error: that of `connect`; None where a peer answered that does not speak this protocol.
    """
    match error:
        case None:
            return f"what listens on port {port} of {host} is no process of this run: choose a port"
        case socket.gaierror():
            return f"the name {host} is not known here ({error.strerror}): correct it, or the DNS"
        case ConnectionRefusedError():
            return f"{host} answers, and nothing listens on port {port}: start it there"
        case TimeoutError():
            return f"no answer from {host} on port {port}: is it up, is a firewall in between?"
    return f"{error.strerror or error}: correct the address, or the network"


class Listener:
    """Accepts connections on a port of all addresses, and identifies each by its first message."""

    def __init__(self, port: int, *, who: str, fix: str):
        """who, fix: of the error where the port cannot be listened on.

        TransientError where another process uses the port, UserError for any other reason.
        """
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        try:
            self._socket = socket.create_server(
                ("", port), family=family, dualstack_ipv6=dual, backlog=_BACKLOG
            )
        except OSError as error:
            kind = TransientError if error.errno == errno.EADDRINUSE else UserError
            raise kind(f"{who} cannot listen on port {port}: {error.strerror}; {fix}") from None
        self._unidentified: list[Connection] = []

    @property
    def wakers(self) -> list[socket.socket | Connection]:
        """What becomes readable when `accept` may have something to return."""
        return [self._socket, *self._unidentified]

    def accept(self, *, within_s: float = 0.0) -> list[tuple[Connection, list[Message]]]:
        """Return peers with their first messages. within_s: how long to wait for any news."""
        wait(self.wakers, within_s)
        while wait([self._socket], 0):
            self._unidentified.append(Connection(self._socket.accept()[0]))
        found = []
        for peer in list(self._unidentified):
            messages = peer.receive()
            if messages and peer.alive:
                found.append((peer, messages))
            elif peer.alive and time.monotonic() - peer.opened_at < _IDENTIFY_WITHIN_S:
                continue
            else:
                peer.drop()  # a stranger must not make the others wait
            self._unidentified.remove(peer)
        return found

    def close(self) -> None:
        """Stop listening and hang up on peers that are not identified."""
        self._socket.close()
        for peer in self._unidentified:
            peer.drop()
