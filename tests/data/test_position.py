"""The position in the data: arithmetic on a list of segments."""

import dataclasses
import json

import pytest

from llamajax.data import Position, with_stages

SETTINGS = {"batch_size": 6, "seq_len": 128, "mixture_hash": "m"}
START = Position.start(**SETTINGS)


def continued(position: Position, step: int, batch_size: int) -> Position:
    """The position of a run whose batch size changes; the data is not read for that."""
    return with_stages(position, [(0, {"batch_size": batch_size})], {}, step=step)


def test_a_change_of_batch_size_neither_repeats_nor_leaves_out():
    assert [START.first_sample(s) for s in (0, 1, 10)] == [0, 6, 60]
    assert continued(START, 50, 6) == START
    position = continued(START, 10, 4)
    assert [position.first_sample(s) for s in (9, 10, 11)] == [54, 60, 64]
    position = continued(position, 12, 5)
    assert [position.first_sample(s) for s in (11, 12, 13)] == [64, 68, 73]
    position = continued(position, 12, 3)  # of two segments at one step the later counts
    assert [position.first_sample(s) for s in (12, 13)] == [68, 71]
    assert position.tokens_seen(13) == (10 * 6 + 2 * 4 + 3) * 128
    started = Position((dataclasses.replace(START.segments[0], starts=(5, 7)),))
    assert continued(started, 10, 4).segments[-1].starts == (5, 7)


@pytest.mark.parametrize("value", [{}, {"segments": []}, {"segments": [{"first_step": 0}]}, None])
def test_json_of_something_else_is_refused(value):
    with pytest.raises(ValueError, match="not a position"):
        Position.from_json(value)


def test_a_run_keeps_the_rounds_of_the_shuffle_that_it_began_with():
    old = START.to_json()
    del old["segments"][0]["rounds"]  # as saved before the number was a choice
    for position, rounds in ((START, 8), (Position.from_json(old), 4)):
        later = continued(position, 10, 4)
        assert {s.rounds for s in later.segments} == {rounds}
        assert Position.from_json(json.loads(json.dumps(later.to_json()))) == later
