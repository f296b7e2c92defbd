"""The roll call of processes: all come, one is missing, two contradict each other."""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from shell import free_port

from llamajax.errors import TransientError, UserError
from llamajax.processes import roll_call
from llamajax.processes.process_facts import describe_difference
from llamajax.processes.roll_call import call_roll

HOST = socket.gethostname()


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def called(port):
    """Calls (process_id, num_processes), at one time; the error's text of each, or ""."""

    def run(*processes: tuple[int, int], timeout_s: float = 30, **facts: dict) -> list[str]:
        def come(process: tuple[int, int]) -> str:
            rank, count = process
            try:
                call_roll(
                    f"127.0.0.1:{port}",
                    num_processes=count,
                    process_id=rank,
                    timeout_s=timeout_s,
                    facts=facts.get(f"of_{rank}", {}),
                )
            except UserError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(len(processes)) as pool:
            return list(pool.map(come, processes))

    return run


def test_all_come_in_any_order_and_the_port_is_free_again(called, port):
    same = {"optim.beta1": "0.9", "problem": None}
    assert called((2, 3), (1, 3), (0, 3), of_0=same, of_1=same, of_2=same) == [""] * 3
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_the_missing_are_named_to_all_that_came(called, monkeypatch):
    """The time is over as soon as process 2 has come, however long that takes."""
    passed_s = []
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(passed_s), sleep=time.sleep)
    monkeypatch.setattr(roll_call, "time", clock)
    monkeypatch.setattr(roll_call, "_contradiction", lambda *_: passed_s.append(3600))
    first, second = called((0, 4), (2, 4))
    assert "of 4 processes 2 came" in first
    assert "missing: process 1, 3. Came besides process 0: 2 from" in first
    assert second == first


def test_without_process_0_its_address_is_named(called, port):
    (said,) = called((1, 2), timeout_s=0.5)
    assert f"process 1 of 2 found no process 0 at 127.0.0.1:{port}" in said
    assert f"127.0.0.1 answers, and nothing listens on port {port}" in said


@pytest.mark.parametrize("text", [b"HTTP/1.1 400 Bad Request\r\n", b'{"problem": null}\n'])
def test_what_is_no_process_0_is_named(called, port, text):
    with socket.create_server(("127.0.0.1", port)) as server, ThreadPoolExecutor(1) as pool:
        said = pool.submit(called, (1, 2), timeout_s=0.5)
        server.settimeout(0.1)
        while not said.done():
            with contextlib.suppress(TimeoutError):
                connection = server.accept()[0]
                connection.sendall(text)
                connection.close()
    assert f"what listens on port {port} of 127.0.0.1 is no process of this run" in said.result()[0]


def test_a_busy_port_passes(port):
    taken = socket.create_server(("", port))
    with taken, pytest.raises(TransientError, match="process 0 cannot listen on port"):
        call_roll(f"127.0.0.1:{port}", num_processes=2, process_id=0, timeout_s=1, facts={})


@pytest.mark.parametrize(
    ("processes", "words"),
    [
        (((0, 2), (1, 3)), "was started for 3 processes, process 0 for 2"),
        (((0, 3), (1, 3), (1, 3)), "two processes came as number 1"),
    ],
)
def test_a_contradiction_is_told_to_all(called, processes, words):
    said = called(*processes)
    assert words in said[0]
    assert set(said) == {said[0]}


ODD = {"process_id": 1, "num_processes": 2, "host": "a", "facts": {}}
STRANGERS = [b"GET / HTTP/1.1\r\n\r\n", b"", b"{}\n", b"[" * 100_000 + b"\n"]
STRANGERS += [
    json.dumps(ODD | wrong).encode() + b"\n"
    for wrong in (
        {"process_id": "1"}, {"process_id": [1]}, {"process_id": True}, {"process_id": -1},
        {"process_id": 2}, {"num_processes": float("nan")}, {"host": {}}, {"facts": 3},
        {"facts": {"a": []}},
    )
]  # fmt: skip


def test_unidentified_peers_are_ignored(called, port):
    """Some speak another protocol, one says nothing and stays, others send almost the right."""
    done = threading.Event()

    def knock(text: bytes) -> socket.socket | None:
        while not done.is_set():
            try:
                connection = socket.create_connection(("127.0.0.1", port), timeout=1)
                connection.sendall(text)
                return connection
            except OSError:
                done.wait(0.01)
        return None

    with ThreadPoolExecutor(len(STRANGERS) + 1) as pool:
        peers = [pool.submit(knock, text) for text in STRANGERS]
        first = pool.submit(called, (0, 2))
        connections = [peer.result() for peer in peers]
        assert called((1, 2)) == first.result() == [""]
        done.set()
    for connection in connections:
        connection.close()


def test_a_key_that_differs_is_named_with_who_has_which_value(called):
    same = {"optim.beta1": "0.9", "optim.learning_rate": "0.1"}
    other = {"optim.beta1": "0.9", "optim.learning_rate": "0.2", "data.seed": "1"}
    said = called((2, 3), (0, 3), (1, 3), of_0=same, of_1=same, of_2=other)
    assert set(said) == {said[0]}
    assert (
        f"differ in optim.learning_rate: 0.1 in process 0 on {HOST}, 1 on {HOST}; "
        f"0.2 in process 2 on {HOST}. They also differ in data.seed."
    ) in said[0]


def test_a_process_that_cannot_start_tells_the_others_why(called):
    said = called((1, 2), (0, 2), of_0={"problem": None}, of_1={"problem": "no data"})
    assert said == [f"process 1 on {HOST}: no data"] * 2
    found = describe_difference([{"problem": "no data"}, {"problem": "damaged data"}], ["a", "b"])
    assert found == "process 0 on a: no data; process 1 on b: damaged data"
