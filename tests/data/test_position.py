"""The position in the data: arithmetic on a list of segments."""

import json

import pytest

from llamajax.data import Position


def start(**changes: object) -> Position:
    return Position.start(**({"batch_size": 6, "seq_len": 128, "mixture_hash": "m"} | changes))


def continued(position: Position, step: int, **changes: object) -> Position:
    settings = {"batch_size": 6, "seq_len": 128, "mixture_hash": "m"} | changes
    return position.continued(step=step, **settings)


def test_steps_read_one_batch_after_the_other():
    assert [start().first_sample(s) for s in (0, 1, 10)] == [0, 6, 60]


def test_continuing_unchanged_adds_nothing():
    assert continued(start(), 50) == start()


def test_a_change_of_batch_size_neither_repeats_nor_leaves_out():
    position = continued(start(), 10, batch_size=4)
    assert [position.first_sample(s) for s in (9, 10, 11)] == [54, 60, 64]
    position = continued(position, 12, batch_size=5)
    assert [position.first_sample(s) for s in (11, 12, 13)] == [64, 68, 73]


@pytest.mark.parametrize(("seq_len", "first"), [(64, 120), (100, 77), (256, 30), (4096, 2)])
def test_a_change_of_length_goes_on_after_the_tokens_read(seq_len, first):
    position = continued(start(), 10, seq_len=seq_len)
    assert position.first_sample(10) == first
    assert 0 <= first * seq_len - 60 * 128 < seq_len


def test_a_change_of_mixture_goes_on_in_the_new_order():
    position = continued(start(), 10, mixture_hash="other")
    assert position.first_sample(10) == 60
    assert position.segment(10).mixture_hash == "other"
    assert position.segment(9).mixture_hash == "m"


def test_two_segments_at_one_step_the_later_counts():
    position = continued(continued(start(), 10, batch_size=4), 10, batch_size=3)
    assert [position.first_sample(s) for s in (10, 11)] == [60, 63]


def test_json_round_trip():
    position = continued(start(), 10, batch_size=4, seq_len=100)
    assert Position.from_json(json.loads(json.dumps(position.to_json()))) == position


@pytest.mark.parametrize("value", [{}, {"segments": []}, {"segments": [{"first_step": 0}]}, None])
def test_json_of_something_else_is_refused(value):
    with pytest.raises(ValueError, match="not a position"):
        Position.from_json(value)


def test_the_past_cannot_be_changed():
    position = continued(start(), 10, batch_size=4)
    with pytest.raises(ValueError, match="before"):
        continued(position, 9, batch_size=5)


def test_a_run_keeps_the_rounds_of_the_shuffle_that_it_began_with():
    new, old = start(), start().to_json()
    del old["segments"][0]["rounds"]  # as saved before the number was a choice
    old = Position.from_json(old)
    assert (new.segments[0].rounds, old.segments[0].rounds) == (8, 4)
    for position in (new, old):
        later = continued(position, 10, seq_len=64)
        assert {s.rounds for s in later.segments} == {position.segments[0].rounds}
        assert Position.from_json(json.loads(json.dumps(later.to_json()))) == later
