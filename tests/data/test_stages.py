"""The position in data that changes at certain steps: what is read, and in which order."""

import dataclasses
import json

import pytest

from llamajax.data import Position, left_out, sample_ids, tokens_reached, with_stages
from llamajax.data.packing import EXAMPLES
from llamajax.training.safety.rollback_log import Rollback, RollbackLog

SIZES = {"batch_size": 4, "seq_len": 100}


def settings(mixture, **changes):
    return SIZES | {"mixture_hash": mixture.hash} | changes


def staged(mixtures, *stages, position=None, step=0):
    """The position of stages, each a first step and its settings."""
    position = position or Position.start(**stages[0][1])
    return with_stages(position, stages, {m.hash: m for m in mixtures}, step=step)


def resumed(position, mixtures, step):
    """The position as a checkpoint of `step` gives it."""
    reached = tokens_reached(position, {m.hash: m for m in mixtures}, step)
    saved = json.loads(json.dumps([position.to_json(), reached]))
    return Position.from_json(saved[0], reached=saved[1]).until(step)


def read(mixtures, position, steps):
    """The source and the number of each sample that these steps read, in order."""
    by_hash, found = {m.hash: m for m in mixtures}, []
    for step in steps:
        segment = position.segment(step)
        mixture = by_hash[segment.mixture_hash]
        for number in sample_ids(mixture, position, step):
            source, sample, _ = mixture.locate(int(number), segment.seq_len, segment.packing)
            found.append((source.path.name, sample, segment.seq_len))
    return found


@pytest.fixture
def sources(prepared, documents):
    return prepared("a", documents), prepared("b", documents[3:])


@pytest.mark.parametrize("weights", [(0.9, 0.1), (0.3, 0.7), (2.0, 1.0, 7.0)])
def test_samples_of_a_source_are_counted_as_grain_mixes_them(opened, prepared, documents, weights):
    paths = [prepared(f"p{i}", documents[i:]) for i in range(len(weights))]
    mixture = opened(*paths, weights=weights)
    order = mixture.order(100, EXAMPLES)
    names = [mixture.locate(order[i], 100, EXAMPLES).source.path.name for i in range(700)]
    for n in (0, 1, 9, 10, 699, 700):
        assert mixture.counts(n) == [names[:n].count(path.name) for path in paths]


def test_a_ramp_reads_each_sample_once(mixture):
    position = staged(
        [mixture],
        (0, settings(mixture)),
        (3, settings(mixture, batch_size=8)),
        (5, settings(mixture, batch_size=16)),
    )
    order = mixture.order(100, EXAMPLES)
    assert [s for _, s, _ in read([mixture], position, range(8))] == [
        order[i] for i in range(3 * 4 + 2 * 8 + 3 * 16)
    ]


def test_with_other_weights_each_source_goes_on_and_a_new_one_begins(opened, sources, prepared):
    a, b = sources
    new = prepared("new", ["z" * 9000])
    mostly_a, mostly_b = (
        opened(a, b, weights=(0.8, 0.2)),
        opened(new, b, a, weights=(0.2, 0.6, 0.2)),
    )
    mixtures = [mostly_a, mostly_b]
    position = staged(mixtures, (0, settings(mostly_a)), (12, settings(mostly_b)))
    begun = staged(mixtures, (0, settings(mostly_a)))
    assert position == staged(mixtures, (0, settings(mostly_b)), position=begun, step=12)  # by hand
    samples = read(mixtures, position, range(30))
    for path in (a, b, new):
        alone = opened(path)
        mine = [sample for name, sample, _ in samples if name == path.name]
        assert mine == [alone.order(100, EXAMPLES)[i] for i in range(len(mine))]
    # back to the first mixture: on from where both stages left its sources
    third = staged(
        mixtures, *[(n, settings(m)) for n, m in ((0, mostly_a), (12, mostly_b), (30, mostly_a))]
    )
    again = read(mixtures, third, range(40))
    mine = [sample for name, sample, _ in again if name == "a"]
    assert mine == [opened(a).order(100, EXAMPLES)[i] for i in range(len(mine))]


def test_longer_samples_go_on_after_the_tokens_that_were_read(opened, sources):
    mixture = opened(sources[0], shuffle=False)
    position = staged([mixture], (0, settings(mixture)), (3, settings(mixture, seq_len=250)))
    assert [s for _, s, _ in read([mixture], position, [3])] == [5, 6, 7, 8]  # 1,200 tokens read


def test_a_position_is_the_same_from_any_step_on(opened, sources):
    one, other = opened(sources[0]), opened(*sources)
    stages = [
        (0, settings(one)),
        (4, settings(one, batch_size=8)),
        (6, settings(other, batch_size=8, seq_len=250)),
    ]
    whole = staged([one, other], *stages)
    assert Position.from_json(whole.to_json()) == whole
    for step in (1, 4, 5, 6, 7):
        saved = resumed(whole, [one, other], step)
        older = Position.from_json(whole.to_json()).until(step)  # it did not say what was reached
        for position in (saved, older):
            assert staged([one, other], *stages, position=position, step=step) == whole


def tokens(samples):
    """The tokens of these samples, each by its source and its number there."""
    return [
        (name, token)
        for name, sample, seq_len in samples
        for token in range(sample * seq_len, (sample + 1) * seq_len)
    ]


@pytest.fixture
def kinds(opened, sources):
    """Stages that differ in their source, in the weights of the same sources, in their length."""
    a, b = (opened(path) for path in sources)
    half, mostly_b = (opened(*sources, weights=weights) for weights in ((0.5, 0.5), (0.2, 0.8)))
    stored = opened(sources[0], shuffle=False)
    ramp = {"batch_size": 8}
    return {
        "source": ([a, b], [settings(a), settings(a, **ramp), settings(b, **ramp)]),
        "weights": ([half, mostly_b], [settings(half), settings(mostly_b), settings(half)]),
        "length": ([stored], [settings(stored), settings(stored, seq_len=200), settings(stored)]),
    }


@pytest.mark.parametrize("kind", ["source", "weights", "length"])
@pytest.mark.parametrize(("back", "bad"), [(2, 3), (2, 5), (4, 7), (5, 8), (2, 8)])
def test_a_rollback_leaves_out_what_led_to_it_on_both_sides_of_a_border(
    kinds, opened, sources, tmp_path, back, bad, kind
):
    mixtures, changes = kinds[kind]
    stages = list(zip((0, 4, 6), changes, strict=True))
    whole, by_hash = staged(mixtures, *stages), {m.hash: m for m in mixtures}
    segment, reached = left_out(whole, by_hash, to_step=back, at_step=bad, borders=(4, 6))
    log = RollbackLog(tmp_path, primary=True)
    entry = {"at_step": bad, "to_step": back, "first_skipped_step": bad, "reason": "test"}
    log.add(Rollback(**entry, segment=dataclasses.asdict(segment), reached=reached))
    log = RollbackLog(tmp_path, primary=True)  # as a restart reads it
    after = log.position(whole.until(back), step=back, rollbacks=0)
    after = staged(mixtures, *stages, position=after, step=back)
    assert [after.segment(step).settings for step in range(9)] == [
        whole.segment(step).settings for step in range(9)
    ]
    before = read(mixtures, whole, range(bad))
    new = read(mixtures, after, range(back, 12))
    assert not set(tokens(before)) & set(tokens(new))
    assert len(set(tokens(new))) == len(tokens(new))
    for path in sources:  # nothing else is left out: parts of samples where the length changes
        mine = [s for s in [*before, *new] if s[0] == path.name]
        if kind == "length":
            assert len(set(tokens(mine))) > max([t for _, t in tokens(mine)], default=-1) - 400
        else:
            order = opened(path).order(100, EXAMPLES)
            assert [sample for _, sample, _ in mine] == [order[i] for i in range(len(mine))]
    for step in range(back + 1, 9):  # from each checkpoint after it
        saved = resumed(after, mixtures, step)
        assert staged(mixtures, *stages, position=saved, step=step) == after


def test_data_that_no_stage_has_any_more_is_not_read_again(opened, sources, prepared):
    """In a fork with another stage than its parent's, and where data.path was changed by hand."""
    a, new = opened(sources[0]), prepared("new", ["z" * 9000])
    both, with_new = opened(*sources), opened(sources[0], new)
    parent = staged([a, both], (0, settings(a)), (5, settings(both)))
    stages = (0, settings(a)), (10, settings(with_new))
    saved = resumed(parent, [a, both], 10)
    fork = staged([a, with_new], *stages, position=saved, step=10)
    samples = read([a, both], parent, range(10)) + read([a, with_new], fork, range(10, 20))
    mine = [sample for name, sample, _ in samples if name == "a"]
    assert mine == [a.order(100, EXAMPLES)[i] for i in range(len(mine))]

    b = opened(sources[1])
    by_hand = staged(
        [b], (0, settings(b)), position=resumed(staged([a], stages[0]), [a], 5), step=5
    )
    stages = (0, settings(b)), (10, settings(with_new))
    saved = resumed(by_hand, [b], 8)
    later = staged([b, with_new], *stages, position=saved, step=8)
    samples = read([a], later, range(5)) + read([b, with_new], later, range(5, 20))
    mine = [sample for name, sample, _ in samples if name == "a"]
    assert mine == [a.order(100, EXAMPLES)[i] for i in range(len(mine))]


def test_a_rollback_without_stages_is_recorded_as_before(mixture):
    position = staged([mixture], (0, settings(mixture)), (6, settings(mixture, batch_size=8)))
    mixtures = {mixture.hash: mixture}
    segment, _ = left_out(position, mixtures, to_step=5, at_step=9, borders=())
    assert (segment.first_step, segment.first_sample, segment.batch_size) == (5, 6 * 4 + 3 * 8, 8)
