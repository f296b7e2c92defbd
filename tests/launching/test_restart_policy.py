"""The verdicts for all nodes, without sockets and processes."""

import pytest

from llamajax.errors import ExitCode
from llamajax.launching.restart_policy import Referee


@pytest.fixture
def referee():
    return Referee(
        nodes=2, processes_per_node=4, max_restarts=2, backoff_s=1.0, timeout_s=10.0, now=0.0
    )


def ready(attempt: int = 0):
    return {"say": "ready", "attempt": attempt, "nodes": 2, "processes_per_node": 4}


def failed(attempt: int, code: int = 1):
    return {"say": "failed", "attempt": attempt, "code": code, "why": "w", "lines": ["l"]}


def started(referee, *attempts: int) -> int:
    """Both nodes are ready; the attempt that starts."""
    first, second = attempts or (0, 0)
    assert referee.hear(0, ready(first), 0.0) == []
    (order,) = referee.hear(1, ready(second), 0.0)
    assert order["order"] == "start"
    return order["attempt"]


def test_an_attempt_number_is_new_to_all(referee):
    assert started(referee, 2, 5) == 5
    referee.hear(0, failed(5), 1.0)
    assert started(referee, 3, 3) == 6


def test_waits_double_and_restarts_end(referee):
    waits = []
    for _ in range(3):
        (order,) = referee.hear(1, failed(started(referee), code=9), 0.0)
        waits.append(order["again_in_s"])
    assert waits == [1.0, 2.0, None]
    assert (order["code"], order["lines"]) == (9, ["l"])


def test_the_longest_wait_is_a_minute():
    referee = Referee(
        nodes=2, processes_per_node=4, max_restarts=99, backoff_s=1.0, timeout_s=1.0, now=0.0
    )
    for _ in range(9):
        (order,) = referee.hear(1, failed(started(referee)), 0.0)
    assert order["again_in_s"] == 60.0


def reported(referee, *steps: int) -> None:
    for step in steps:
        assert referee.hear(0, {"say": "checkpoint", "step": step}, 0.0) == []


def test_failures_after_progress_do_not_count(referee):
    started(referee)
    for step in range(0, 40, 10):  # each starts where the one before came to
        reported(referee, step, step + 10)
        (order,) = referee.hear(1, failed(referee.attempt), 0.0)
        assert order["again_in_s"] == 1.0
        assert f"checkpoint {step + 10} was reached" in order["then"]
        started(referee)
    for wait in (1.0, 2.0, None):
        reported(referee, 40)  # it starts there, and completes none
        (order,) = referee.hear(1, failed(referee.attempt), 0.0)
        assert order["again_in_s"] == wait
        if wait:
            started(referee)
    assert order["then"] == "given up: 3 failures without progress"


def test_a_checkpoint_that_was_there_before_is_no_progress(referee):
    started(referee)
    reported(referee, 100)  # of an earlier launch
    referee.hear(1, failed(referee.attempt), 0.0)
    started(referee)
    reported(referee, 90, 100)  # the newest was damaged, and is done again
    referee.hear(1, failed(referee.attempt), 0.0)
    assert referee.without_progress == 2


@pytest.mark.parametrize("code", [ExitCode.USER_ERROR, ExitCode.GUARD_STOP, ExitCode.BAD_DEVICE])
def test_what_a_restart_cannot_help_is_not_started_again(referee, code):
    (order,) = referee.hear(1, failed(started(referee), code=code), 0.0)
    assert (order["code"], order["again_in_s"]) == (code, None)
    assert f"after code {code} that would not help" in order["then"]


def test_without_restarts_progress_changes_nothing():
    referee = Referee(
        nodes=2, processes_per_node=4, max_restarts=0, backoff_s=1.0, timeout_s=1.0, now=0.0
    )
    started(referee)
    reported(referee, 0, 5)
    (order,) = referee.hear(1, failed(referee.attempt), 0.0)
    assert order["again_in_s"] is None


def test_the_wait_stays_a_minute_however_often_it_fails():
    referee = Referee(
        nodes=2, processes_per_node=4, max_restarts=5000, backoff_s=1.0, timeout_s=1.0, now=0.0
    )
    referee.without_progress = 2000
    (order,) = referee.hear(1, failed(started(referee)), 0.0)
    assert order["again_in_s"] == 60.0


def test_only_the_first_failure_of_an_attempt_counts(referee):
    attempt = started(referee)
    assert referee.hear(1, failed(attempt, code=9), 0.0)[0]["code"] == 9
    assert referee.hear(0, failed(attempt, code=134), 0.0) == []
    assert referee.without_progress == 1


def test_a_failure_while_stopping_is_a_stop(referee):
    attempt = started(referee)
    assert referee.hear(0, {"say": "stopping"}, 0.0) == [{"order": "stop"}]
    (order,) = referee.hear(1, failed(attempt), 0.0)
    assert (order["code"], order["again_in_s"]) == (143, None)


def test_all_must_have_ended(referee):
    attempt = started(referee)
    assert referee.hear(0, {"say": "ended", "attempt": attempt, "code": 0}, 0.0) == []
    assert referee.lose(0, 0.0) == []  # its work is done
    (order,) = referee.hear(1, {"say": "ended", "attempt": attempt, "code": 0}, 0.0)
    assert (order["order"], order["code"]) == ("end", 0)


def test_a_node_that_saved_and_left_stops_the_others(referee):
    attempt = started(referee)
    stop = referee.hear(0, {"say": "ended", "attempt": attempt, "code": 143}, 0.0)
    assert stop == [{"order": "stop"}]
    (order,) = referee.hear(1, {"say": "ended", "attempt": attempt, "code": 0}, 0.0)
    assert order["code"] == 143


def test_time_counts_from_the_restart(referee):
    attempt = started(referee)
    assert referee.tick(1000.0) == []  # it runs
    referee.hear(1, failed(attempt), 1000.0)
    referee.hear(0, ready(), 1001.0)
    assert referee.tick(1010.9) == []
    (order,) = referee.tick(1011.1)
    assert order["code"] == 75
    assert "missing: node 1" in order["why"]
