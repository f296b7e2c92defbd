"""Step times never flatter, and every second is accounted for."""

import pytest

from llamajax.monitoring import StepTimer


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timer(clock: Clock) -> StepTimer:
    return StepTimer(tokens_per_step=1000, clock=clock)


def test_time_between_fetches(timer: StepTimer, clock: Clock):
    clock.pass_s(3)
    with timer.pause("compile"):
        clock.pass_s(10)
    timer.mark_dispatched(1)
    for step in (2, 3):
        timer.mark_dispatched(step)
        clock.pass_s(2 if step == 2 else 4)
        time = timer.mark_fetched(step - 1)
    assert (time.step_time_s, time.tokens_per_s) == (4.0, 250.0)
    clock.pass_s(3)
    timer.mark_fetched(3)
    assert timer.mean_tokens_per_s == pytest.approx(3000 / 9)
    assert timer.breakdown() == {
        "wall_s": 22.0,
        "steps_s": 9.0,
        "compile_s": 10.0,
        "other_s": 3.0,
        "goodput": 9 / 22,
    }


def test_several_steps_a_fetch(timer: StepTimer, clock: Clock):
    for step in range(1, 6):
        timer.mark_dispatched(step)
    clock.pass_s(10)
    assert timer.mark_fetched(5).step_time_s == 2.0


def test_a_pause_between_steps_is_taken_out(timer: StepTimer, clock: Clock):
    timer.mark_dispatched(1)
    clock.pass_s(2)
    timer.mark_fetched(1)
    with timer.pause("evaluation"):
        clock.pass_s(50)
        with timer.pause("checkpoint"):
            clock.pass_s(7)
    timer.mark_dispatched(2)
    clock.pass_s(2)
    assert timer.mark_fetched(2).step_time_s == 2.0
    breakdown = timer.breakdown()
    assert breakdown["evaluation_s"] == 57.0
    assert "checkpoint_s" not in breakdown
    assert breakdown["other_s"] == 0.0


def test_a_pause_over_a_running_step_flatters_nothing(timer: StepTimer, clock: Clock):
    """Saving waits for the step itself: taking that wait out would make the step look free."""
    timer.mark_dispatched(1)
    with timer.pause("checkpoint"):
        clock.pass_s(5)
    assert timer.mark_fetched(1).step_time_s == 5.0
    assert timer.overlapped() == {"checkpoint": 5.0}
    assert "checkpoint_s" not in timer.breakdown()


def test_a_pause_that_raises_is_accounted(timer: StepTimer, clock: Clock):
    def interrupted() -> None:
        with timer.pause("evaluation"):
            clock.pass_s(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert timer.breakdown()["evaluation_s"] == 1.0


def test_before_the_first_step(timer: StepTimer):
    assert timer.mean_tokens_per_s is None
    assert timer.breakdown()["goodput"] == 0.0
    timer.mark_dispatched(7)
    timer.mark_fetched(7)
    with pytest.raises(ValueError, match="step 7 is fetched after step 7"):
        timer.mark_fetched(7)
