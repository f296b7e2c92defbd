"""Step times are never too short, and every second is accounted for."""

import contextlib
import threading

import pytest

from llamajax.monitoring import StepTimer


class Clock:
    """Seconds that pass only when a test says so."""

    now = 100.0

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def timer(clock):
    return StepTimer(tokens_of=lambda step: 1000, clock=lambda: clock.now)


def test_time_between_fetches(timer, clock):
    clock.pass_s(3)
    with timer.pause():
        clock.pass_s(10)
    timer.mark_dispatched(1)
    for step in (2, 3):
        timer.mark_dispatched(step)
        clock.pass_s(2 if step == 2 else 4)
        timer.mark_fetched(step - 1)
        time = timer.take()
    assert time == {"step_time_s": 4.0, "tokens_per_s": 250.0, "data_wait_s": 0.0}
    clock.pass_s(3)
    timer.mark_fetched(3)
    assert timer.take()["step_time_s"] == 3.0
    assert timer.paused_s == 10.0


def test_several_steps_a_fetch_and_several_fetches_a_row(timer, clock):
    for step in range(1, 6):
        timer.mark_dispatched(step)
    clock.pass_s(10)
    timer.mark_fetched(5)
    assert timer.take()["step_time_s"] == 2.0
    for step in (6, 7, 8):
        timer.mark_dispatched(step)
        clock.pass_s(step - 5)
        timer.mark_fetched(step)
    time = timer.take()
    assert (time["step_time_s"], time["tokens_per_s"]) == (2.0, 500.0)


def test_a_pause_between_steps_is_taken_out(timer, clock):
    timer.mark_dispatched(1)
    clock.pass_s(2)
    timer.mark_fetched(1)
    timer.take()
    with timer.pause():
        clock.pass_s(50)
        with timer.pause():
            clock.pass_s(7)
    timer.mark_dispatched(2)
    clock.pass_s(2)
    timer.mark_fetched(2)
    assert timer.take()["step_time_s"] == 2.0
    assert timer.paused_s == 57.0


def test_waiting_for_a_batch_counts_from_the_end_of_the_running_step(timer, clock):
    """The loop draws batch n + 1 and fetches step n - 1 while step n, of 2 seconds, runs."""
    with timer.pause(data_wait=True):
        clock.pass_s(7)
    rows = []
    for step in range(1, 5):
        timer.mark_dispatched(step)
        if step < 4:
            with timer.pause(data_wait=True):
                clock.pass_s(2)
                timer.mark_done(step)
                clock.pass_s(3)
        if step > 1:
            timer.mark_fetched(step - 1)
            rows.append(timer.take())
    clock.pass_s(2)
    timer.mark_fetched(4)
    rows.append(timer.take())
    assert [row["step_time_s"] for row in rows] == [2.0, 2.0, 2.0, 2.0]
    assert [row["data_wait_s"] for row in rows] == [7.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize("data_wait", [True, False])
def test_a_pause_that_a_running_step_hides_is_step_time(timer, clock, data_wait):
    """Saving waits for the step itself: without that wait the step would look free."""
    timer.mark_dispatched(1)
    with timer.pause(data_wait=data_wait):
        clock.pass_s(5)
    assert timer.paused_s == 0.0
    clock.pass_s(1)
    timer.mark_done(1)
    timer.mark_fetched(1)
    time = timer.take()
    assert (time["step_time_s"], time["data_wait_s"]) == (6.0, 0.0)


def test_a_thread_notes_when_a_step_is_done(timer, clock):
    timer.mark_dispatched(1)
    noted = threading.Event()
    clock.pass_s(2)
    timer.watch(1, lambda: None)
    timer.watch(2, noted.set)  # one after the other: step 1 is noted when this is called
    assert noted.wait(60)
    clock.pass_s(30)
    timer.mark_fetched(1)
    timer.close()
    assert timer.take()["step_time_s"] == 2.0


def test_a_pause_that_raises_is_accounted(timer, clock):
    with contextlib.suppress(KeyboardInterrupt), timer.pause():
        clock.pass_s(1)
        raise KeyboardInterrupt
    assert timer.paused_s == 1.0


def test_a_step_is_fetched_once(timer):
    timer.mark_dispatched(7)
    timer.mark_fetched(7)
    with pytest.raises(ValueError, match="step 7 is fetched after step 7"):
        timer.mark_fetched(7)
