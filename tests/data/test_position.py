"""The position in the data: arithmetic on a list of segments."""

import dataclasses
import json

import pytest

from llamajax.data import Position

SETTINGS = {"batch_size": 6, "seq_len": 128, "mixture_hash": "m"}
START = Position.start(**SETTINGS)


def continued(position: Position, step: int, **changes: object) -> Position:
    return position.continued(step=step, **(SETTINGS | changes))


def test_steps_read_one_batch_after_the_other():
    assert [START.first_sample(s) for s in (0, 1, 10)] == [0, 6, 60]
    assert continued(START, 50) == START


def test_a_change_of_batch_size_neither_repeats_nor_leaves_out():
    position = continued(START, 10, batch_size=4)
    assert [position.first_sample(s) for s in (9, 10, 11)] == [54, 60, 64]
    position = continued(position, 12, batch_size=5)
    assert [position.first_sample(s) for s in (11, 12, 13)] == [64, 68, 73]
    position = continued(position, 12, batch_size=3)  # of two segments at one step the later counts
    assert [position.first_sample(s) for s in (12, 13)] == [68, 71]
    assert position.tokens_seen(13) == (10 * 6 + 2 * 4 + 3) * 128


@pytest.mark.parametrize(("seq_len", "first"), [(64, 120), (100, 77), (256, 30), (4096, 2)])
def test_a_change_of_length_continues_after_the_tokens_read(seq_len, first):
    position = continued(START, 10, seq_len=seq_len)
    assert position.first_sample(10) == first
    assert 0 <= first * seq_len - 60 * 128 < seq_len


def test_a_change_of_mixture_continues_in_the_new_order():
    position = continued(START, 10, mixture_hash="other")
    assert position.first_sample(10) == 60
    assert [position.segment(step).mixture_hash for step in (9, 10)] == ["m", "other"]


@pytest.mark.parametrize("value", [{}, {"segments": []}, {"segments": [{"first_step": 0}]}, None])
def test_json_of_something_else_is_refused(value):
    with pytest.raises(ValueError, match="not a position"):
        Position.from_json(value)


def test_what_earlier_stages_read_counts_where_the_order_changes():
    started = Position((dataclasses.replace(START.segments[0], starts=(5, 7)),))
    assert continued(started, 10, batch_size=4).segments[-1].starts == (5, 7)
    position = continued(started, 10, mixture_hash="other")
    assert (position.first_sample(10), position.segments[-1].starts) == (60 + 12, ())


def test_the_past_cannot_be_changed():
    position = continued(START, 10, batch_size=4)
    with pytest.raises(ValueError, match="before"):
        continued(position, 9, batch_size=5)


def test_a_run_keeps_the_rounds_of_the_shuffle_that_it_began_with():
    old = START.to_json()
    del old["segments"][0]["rounds"]  # as saved before the number was a choice
    for position, rounds in ((START, 8), (Position.from_json(old), 4)):
        later = continued(position, 10, batch_size=4, seq_len=64)
        assert {s.rounds for s in later.segments} == {rounds}
        assert Position.from_json(json.loads(json.dumps(later.to_json()))) == later
