"""Messages as lines of JSON, and peers that hang up, fall silent or send anything else."""

import contextlib
import socket
import threading
from types import SimpleNamespace

import pytest

from llamajax.processes import line_protocol
from llamajax.processes.line_protocol import Connection, Listener, why_unreachable


@pytest.fixture
def ends():
    """A connection, and the socket of its peer."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Connection(ours), theirs


def test_messages_arrive_whole_until_the_peer_hangs_up(ends):
    connection, peer = ends
    assert connection.receive() == []
    peer.sendall(b'{"a": 1}\n{"b"')
    assert connection.receive() == [{"a": 1}]
    peer.sendall(b': 2}\n{"c": 3}\n')
    peer.close()
    assert connection.receive(within_s=60) == [{"b": 2}, {"c": 3}]
    assert not connection.alive


@pytest.mark.parametrize(
    "text", [b"GET / HTTP/1.1\r\n", b"[1]\n", b"x" * 10**5, b"[" * 9999 + b"\n"]
)
def test_what_is_no_message_ends_the_connection(ends, monkeypatch, text):
    monkeypatch.setattr(line_protocol, "_MAX_LINE_BYTES", 10**5)
    connection, peer = ends
    peer.sendall(text)
    assert connection.receive() == []
    assert not connection.alive


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (None, "what listens on port 7 of host is no process of this run"),
        (socket.gaierror(-2, "Name or service not known"), "the name host is not known here"),
        (ConnectionRefusedError(111, "Connection refused"), "nothing listens on port 7"),
        (TimeoutError("timed out"), "no answer from host on port 7"),
        (OSError(113, "No route to host"), "No route to host: correct the address"),
    ],
)
def test_why_nobody_was_reached(error, words):
    assert words in why_unreachable(error, "host", 7)


def test_beats_keep_a_connection_alive_and_silence_ends_it(ends, monkeypatch):
    now = line_protocol.time.monotonic()
    connection, peer = ends[0], Connection(ends[1])
    for later, alive in ((15, True), (30, True), (60, False)):
        clock = SimpleNamespace(monotonic=lambda at=now + later: at)
        monkeypatch.setattr(line_protocol, "time", clock)
        if alive:
            peer.beat()
        assert connection.receive() == []
        connection.beat()
        assert connection.alive == alive
        assert peer.receive() == []


def returns(call, *arguments) -> bool:
    """Return whether a call comes back; one that does not is left to its thread."""
    thread = threading.Thread(target=call, args=arguments, daemon=True)
    thread.start()
    thread.join(30)
    return not thread.is_alive()


def test_closing_ends_with_a_peer_that_never_stops_sending(ends, monkeypatch):
    monkeypatch.setattr(line_protocol, "_HANG_UP_S", 0.1)
    connection, peer = ends

    def send() -> None:
        with peer, contextlib.suppress(OSError):  # until the connection is closed
            while True:
                peer.sendall(b"x")

    threading.Thread(target=send, daemon=True).start()
    assert returns(connection.close)


def test_a_silent_peer_is_dropped_without_waiting_for_it(monkeypatch):
    monkeypatch.setattr(line_protocol, "_HANG_UP_S", 1000.0)
    monkeypatch.setattr(line_protocol, "_IDENTIFY_WITHIN_S", 0.0)
    listener = Listener(0, who="a test", fix="")
    with socket.create_connection(("127.0.0.1", listener.wakers[0].getsockname()[1])) as peer:
        assert returns(lambda: listener.accept(within_s=60))
        assert peer.recv(1) == b""
    listener.close()
