"""Several launchers, started by hand as on several nodes: they start, fail and stop together."""

import contextlib
import os
import re
import signal
import socket

import pytest

from llamajax.launching.launch_options import LaunchOptions
from llamajax.launching.node_protocol import NodeServer
from llamajax.launching.worker_logs import log_path
from llamajax.processes.line_protocol import connect

RANK = "print(rank, os.environ['LLAMAJAX_NUM_PROCESSES'], os.environ['LLAMAJAX_COORDINATOR'])\n"
WAIT = "print(os.getpid(), os.getppid())\nif attempt == 0: wait_for_ever()"


def test_ranks_go_over_the_nodes_and_all_finish(start_node, free_ports):
    second, first = (start_node(rank, RANK) for rank in (1, 0))
    assert (first.wait()[0], second.wait()[0]) == (0, 0)
    for node, rank in ((first, 0), (first, 1), (second, 2), (second, 3)):
        assert node.log(rank, 0) == f"{rank} 4 127.0.0.1:{free_ports}\n"


def test_nodes_share_the_attempt_number_and_a_failure_restarts_all(start_node, tmp_path):
    """Node 1 has logs of three earlier attempts, node 0 of none."""
    earlier = tmp_path / "logs_1"
    earlier.mkdir()
    for attempt in range(3):
        log_path(earlier, 3, attempt).write_text("earlier\n")
    lines = "print('attempt', attempt)\n"
    lines += "if attempt == 3 and rank == 3: os._exit(9)\nif attempt == 3: wait_for_ever()"
    first, second = (start_node(rank, lines) for rank in (0, 1))
    (code, text), (other, _) = first.wait(), second.wait()
    assert (code, other) == (0, 0), text
    assert "worker 3 failed: code 9 (node 1)" in text
    assert [node.log(rank, 4) for node, rank in ((first, 0), (second, 3))] == ["attempt 4\n"] * 2
    assert not log_path(first.logs, 0, 2).exists()


def test_all_nodes_exit_with_the_code_of_the_worker_that_failed(start_node):
    lines = "if rank == 2: os._exit(6)\nwait_for_ever()"
    first, second = (start_node(rank, lines, "--max_restarts=1") for rank in (0, 1))
    assert (first.wait()[0], second.wait()[0]) == (6, 6)


def waiting(start_node):
    """Two nodes whose workers have begun, and wait in their first attempt."""
    first, second = (start_node(rank, WAIT) for rank in (0, 1))
    assert first.log(0, 0)
    assert second.log(3, 0)
    return first, second


def test_a_signal_to_one_node_stops_all(start_node):
    first, second = waiting(start_node)
    os.kill(second.process.pid, signal.SIGTERM)
    assert (first.wait()[0], second.wait()[0]) == (143, 143)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_dies_and_comes_back_takes_part_again(start_node, rank):
    nodes = waiting(start_node)
    nodes[rank].process.kill()
    again = start_node(rank, WAIT)  # its logs number on: this is attempt 1
    (code, text), (other, said) = again.wait(), nodes[1 - rank].wait()
    assert (code, other) == (0, 0), text + said
    assert f"the launcher of node {rank} is gone" in said


def test_a_missing_node_0_is_named(start_node, free_ports):
    code, text = start_node(1, RANK, "--timeout_s=1").wait()
    assert code == 75
    assert f"no launcher of node 0 at 127.0.0.1:{free_ports + 1}" in text


def test_strangers_disturb_no_launcher_of_node_0(free_ports):
    coordinator = f"127.0.0.1:{free_ports}"
    server = NodeServer(
        LaunchOptions(processes_per_node=1, nodes=2, node_rank=0, coordinator=coordinator)
    )
    ready = {"say": "ready", "node": 1, "attempt": 0, "nodes": 2, "processes_per_node": 1}
    server.say(ready)
    odd = [{"node": True}, {"node": 0}, {"attempt": "0"}, {"nodes": None}, {"say": ["ready"]}]
    messages = [{}, {"node": 1}, *(ready | wrong for wrong in odd), {"say": "stopping", "node": []}]
    strangers = [connect("127.0.0.1", free_ports + 1) for _ in messages]
    for stranger, message in zip(strangers, messages, strict=True):
        stranger.send(message)
    heard = [stranger.receive(within_s=0.1) or server.orders() for stranger in strangers]
    assert heard == [[] for _ in strangers]
    node = connect("127.0.0.1", free_ports + 1)
    node.send(ready)
    node.send({"say": "failed", "attempt": 0})  # of a node, and damaged
    orders = []
    while not orders:
        orders = server.orders()
    assert orders == node.receive(within_s=60) == [{"order": "start", "attempt": 0}]
    for connection in (*strangers, node, server):
        connection.close()


def test_a_stranger_in_the_place_of_node_0_is_no_reason_to_wait_longer(start_node, free_ports):
    with socket.create_server(("127.0.0.1", free_ports + 1)) as server:
        node = start_node(1, RANK, "--timeout_s=2")
        server.settimeout(0.1)
        while node.process.poll() is None:
            with contextlib.suppress(TimeoutError):
                connection = server.accept()[0]
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")
                connection.close()
    code, text = node.wait()
    assert code == 75
    assert "is no process of this run" in text


def test_nodes_that_contradict_each_other_are_refused(start_node):
    first, second = start_node(0, RANK), start_node(1, RANK, nodes_in_all=3)
    for code, text in (first.wait(), second.wait()):
        assert code == 2
        assert re.search(r"node 1 was launched with --nodes=3 .* --nodes=2", text)


def test_a_second_launcher_of_a_node_is_refused_and_harms_nobody(start_node, tmp_path):
    lines = "print('x')\nsignal.signal(signal.SIGTERM, lambda *_: os._exit(143))\n"
    lines += "wait_for_ever()"
    first, second = (start_node(rank, lines) for rank in (0, 1))
    assert first.log(0, 0)
    code, text = start_node(1, lines).wait()
    assert code == 2
    assert "already" in text
    assert first.process.poll() is None
    os.kill(first.process.pid, signal.SIGTERM)
    assert (first.wait()[0], second.wait()[0]) == (143, 143)
