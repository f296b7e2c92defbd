"""The roll call of processes: all come, one is missing, two contradict each other."""

import socket
import threading

import pytest

from llamajax.errors import TransientError, UserError
from llamajax.processes.process_facts import describe_difference
from llamajax.processes.roll_call import call_roll


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"127.0.0.1:{port}"


def called(
    address: str,
    *processes: tuple[int, int],
    timeout_s: float = 30,
    facts: dict[int, dict[str, str]] | None = None,
) -> dict[int, str]:
    """What each (process_id, num_processes) is told: its error's text, or nothing."""
    told: dict[int, str] = {}

    def come(place: int, rank: int, count: int) -> None:
        try:
            call_roll(
                address,
                num_processes=count,
                process_id=rank,
                timeout_s=timeout_s,
                facts=(facts or {}).get(rank, {}),
            )
            told[place] = ""
        except UserError as error:
            told[place] = str(error)

    threads = [
        threading.Thread(target=come, args=(place, *process))
        for place, process in enumerate(processes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_all_come_in_any_order_and_the_port_is_free_again(address):
    assert called(address, (2, 3), (1, 3), (0, 3)) == {0: "", 1: "", 2: ""}
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        pass


def test_the_missing_are_named_to_all_that_came(address):
    told = called(address, (0, 4), (2, 4), timeout_s=1)
    assert "of 4 processes 2 came" in told[0]
    assert "missing: process 1, 3. Came besides process 0: 2 from" in told[0]
    assert told[1] == told[0]


def test_without_process_0_its_address_is_named(address):
    told = called(address, (1, 2), timeout_s=0.5)
    assert f"process 1 of 2 found no process 0 at {address}" in told[0]


def test_a_busy_port_passes(address):
    taken = socket.create_server(("", int(address.rpartition(":")[2])))
    with taken, pytest.raises(TransientError, match="process 0 cannot listen on port"):
        call_roll(address, num_processes=2, process_id=0, timeout_s=1, facts={})


def test_different_numbers_are_told_to_both(address):
    told = called(address, (0, 2), (1, 3))
    assert "was started for 3 processes, process 0 for 2" in told[0]
    assert told[1] == told[0]


def test_one_rank_twice_is_an_error(address):
    told = called(address, (0, 3), (1, 3), (1, 3))
    assert all("two processes came as number 1" in text for text in told.values())


def test_strangers_do_no_harm(address):
    port = int(address.rpartition(":")[2])
    done = threading.Event()

    def knock() -> None:
        while not done.is_set():
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n")
                    return
            except OSError:
                done.wait(0.01)

    stranger = threading.Thread(target=knock)
    stranger.start()
    told = {}
    first = threading.Thread(target=lambda: told.update(called(address, (0, 2))))
    first.start()
    stranger.join()
    assert called(address, (1, 2)) == {0: ""}
    first.join()
    assert told == {0: ""}


def test_a_key_that_differs_is_named_with_who_has_which_value(address):
    facts = {rank: {"optim.beta1": "0.9", "optim.learning_rate": "0.1"} for rank in range(3)}
    facts[2] = {"optim.beta1": "0.9", "optim.learning_rate": "0.2", "data.seed": "1"}
    told = called(address, (2, 3), (0, 3), (1, 3), facts=facts)
    assert set(told.values()) == {told[0]}
    host = socket.gethostname()
    assert (
        f"differ in optim.learning_rate: 0.1 in process 0 on {host}, 1 on {host}; "
        f"0.2 in process 2 on {host}. They also differ in data.seed."
    ) in told[0]


def test_a_process_that_cannot_start_tells_the_others_why(address):
    told = called(address, (1, 2), (0, 2), facts={0: {"problem": None}, 1: {"problem": "no data"}})
    assert told == dict.fromkeys((0, 1), f"process 1 on {socket.gethostname()}: no data")


def test_equal_facts_pass(address):
    facts = {"optim.beta1": "0.9", "problem": None}
    assert called(address, (0, 2), (1, 2), facts={0: facts, 1: facts}) == {0: "", 1: ""}


def test_processes_that_cannot_start_for_different_reasons_are_all_named():
    found = describe_difference([{"problem": "no data"}, {"problem": "damaged data"}], ["a", "b"])
    assert found == "process 0 on a: no data; process 1 on b: damaged data"
