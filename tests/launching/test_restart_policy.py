"""The orders for all nodes, without sockets and processes."""

import pytest

from llamajax.errors import ExitCode
from llamajax.launching.launch_options import LaunchOptions
from llamajax.launching.restart_policy import RestartPolicy


def policy_of(*, max_restarts: int = 2) -> RestartPolicy:
    """Two nodes of four workers."""
    options = LaunchOptions(
        processes_per_node=4, nodes=2, max_restarts=max_restarts, timeout_s=10.0
    )
    return RestartPolicy(options, now=0.0)


@pytest.fixture
def policy():
    return policy_of()


def ready(attempt: int = 0):
    return {"say": "ready", "attempt": attempt, "nodes": 2, "processes_per_node": 4}


def start(policy, *attempts: int) -> None:
    """Both nodes are ready."""
    first, second = attempts or (0, 0)
    assert policy.on_message(0, ready(first), 0.0) == []
    (order,) = policy.on_message(1, ready(second), 0.0)
    assert order == {"order": "start", "attempt": policy.attempt}


def fail(policy, code: int = 1, *, node: int = 1, now: float = 0.0) -> dict:
    """A node reports a failure; the order that follows."""
    message = {"say": "failed", "attempt": policy.attempt, "code": code, "why": "w", "lines": ["l"]}
    (order,) = policy.on_message(node, message, now)
    return order


def report(policy, *steps: int) -> None:
    for step in steps:
        assert policy.on_message(0, {"say": "checkpoint", "step": step}, 0.0) == []


def end(policy, node: int, code: int) -> list[dict]:
    return policy.on_message(node, {"say": "ended", "attempt": policy.attempt, "code": code}, 0.0)


def test_an_attempt_number_is_new_to_all(policy):
    start(policy, 2, 5)
    assert policy.attempt == 5
    fail(policy)
    start(policy, 3, 3)
    assert policy.attempt == 6


def test_waits_double_and_restarts_end(policy):
    orders = []
    for _ in range(3):
        start(policy)
        orders.append(fail(policy, code=9))
    assert [order["again_in_s"] for order in orders] == [1.0, 2.0, None]
    assert (orders[-1]["code"], orders[-1]["lines"]) == (9, ["l"])


@pytest.mark.parametrize("failures", [9, 2000])
def test_the_longest_wait_is_a_minute(failures):
    policy = policy_of(max_restarts=5000)
    for _ in range(failures):
        start(policy)
        order = fail(policy)
    assert order["again_in_s"] == 60.0


def test_failures_after_progress_do_not_count(policy):
    for step in range(0, 40, 10):  # each starts where the one before came to
        start(policy)
        report(policy, step, step + 10)
        order = fail(policy)
        assert order["again_in_s"] == 1.0
        assert f"checkpoint {step + 10} was reached" in order["then"]
    for wait in (1.0, 2.0, None):
        start(policy)
        report(policy, 40)  # it starts there, and completes none
        order = fail(policy)
        assert order["again_in_s"] == wait
    assert order["then"] == "given up: 3 failures without progress"


def test_a_checkpoint_that_was_there_before_is_no_progress(policy):
    for steps in ((100,), (90, 100)):  # of an earlier launch; damaged, and written again
        start(policy)
        report(policy, *steps)
        fail(policy)
    assert policy.without_progress == 2


@pytest.mark.parametrize("code", [ExitCode.USER_ERROR, ExitCode.GUARD_STOP, ExitCode.BAD_DEVICE])
def test_what_a_restart_cannot_help_is_not_started_again(policy, code):
    start(policy)
    order = fail(policy, code)
    assert (order["code"], order["again_in_s"]) == (code, None)
    assert f"after code {code} that would not help" in order["then"]


def test_without_restarts_progress_changes_nothing():
    policy = policy_of(max_restarts=0)
    start(policy)
    report(policy, 0, 5)
    assert fail(policy)["again_in_s"] is None


def test_only_the_first_failure_of_an_attempt_counts(policy):
    start(policy)
    assert fail(policy, code=9)["code"] == 9
    with pytest.raises(ValueError, match="not enough values"):  # no order
        fail(policy, code=134, node=0)
    assert policy.without_progress == 1


def test_a_failure_while_stopping_is_a_stop(policy):
    start(policy)
    assert policy.on_message(0, {"say": "stopping"}, 0.0) == [{"order": "stop"}]
    order = fail(policy)
    assert (order["code"], order["again_in_s"]) == (143, None)


def test_all_must_have_ended(policy):
    start(policy)
    assert end(policy, 0, 0) == []
    assert policy.on_disconnect(0, 0.0) == []  # its work is done
    (order,) = end(policy, 1, 0)
    assert (order["order"], order["code"]) == ("end", 0)


def test_a_node_that_saved_and_left_stops_the_others(policy):
    start(policy)
    assert end(policy, 0, 143) == [{"order": "stop"}]
    (order,) = end(policy, 1, 0)
    assert order["code"] == 143


def test_time_counts_from_the_restart(policy):
    start(policy)
    assert policy.on_time(1000.0) == []  # it runs
    fail(policy, now=1000.0)
    policy.on_message(0, ready(), 1001.0)
    assert policy.on_time(1010.9) == []
    (order,) = policy.on_time(1011.1)
    assert order["code"] == 75
    assert "missing: node 1" in order["why"]
