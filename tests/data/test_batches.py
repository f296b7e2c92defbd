"""Batches against a loop over tokens; the order of samples; rows, threads, padding."""

import dataclasses
import threading

import numpy as np
import pytest

from llamajax.data import BATCH_KEYS, Position, eval_batches, sample_ids, sample_order, with_stages
from llamajax.data import train_batches as read_batches
from llamajax.data.packing import EXAMPLES

BOS, EOS = 256, 257


def reference(window: np.ndarray, seq_len: int, *, masked: bool) -> dict[str, np.ndarray]:
    """One sample from its at most T + 1 tokens, one target at a time."""
    sample = {name: np.zeros(seq_len, np.int64) for name in BATCH_KEYS}
    segment, position = 1, 0
    for t in range(len(window) - 1):
        if masked and t > 0 and window[t] == BOS:
            segment, position = segment + 1, 0
        values = (window[t], window[t + 1], position, segment, not masked or window[t + 1] != BOS)
        for name, value in zip(BATCH_KEYS, values, strict=True):
            sample[name][t] = value
        position += 1
    return sample


def check(batch, row: int, window: np.ndarray, seq_len: int, *, masked: bool = True) -> None:
    expected = reference(window, seq_len, masked=masked)
    counted = expected["segment_ids"] > 0
    for name, values in expected.items():
        where = counted if name in ("tokens", "targets") else slice(None)
        np.testing.assert_array_equal(batch[name][row][where], values[where], err_msg=name)


def start(mixture, *, batch_size: int = 4, seq_len: int = 100) -> Position:
    return Position.start(batch_size=batch_size, seq_len=seq_len, mixture_hash=mixture.hash)


def train(mixture, position: Position, *, rows: range = range(4), first_step: int = 0, **options):
    options = {"num_threads": 0, "prefetch": 0} | options
    mixtures = {mixture.hash: mixture}
    return read_batches(
        mixtures, position, first_step=first_step, rows=lambda size: rows, **options
    )


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("seq_len", [1, 7, 100, 1365, 4095, 4096, 4097, 8192, 9001])
def test_samples_are_the_stream_cut_at_the_sequence_length(
    prepared, opened, documents, stream, seq_len, masked
):
    path = prepared("a", documents)
    mixture = opened(path, seq_len=seq_len, shuffle=False, mask_documents=masked)
    assert mixture.sources[0].samples(seq_len, EXAMPLES).count == (len(stream) - 1) // seq_len
    rows = range(min(300, mixture.sources[0].samples(seq_len, EXAMPLES).count))
    batch = next(train(mixture, start(mixture, batch_size=999, seq_len=seq_len), rows=rows))
    for row in rows:
        window = stream[row * seq_len : row * seq_len + seq_len + 1]
        check(batch, row, window, seq_len, masked=masked)
    dtypes = {name: str(value.dtype) for name, value in batch.items()}
    assert dtypes == dict.fromkeys(BATCH_KEYS, "int32") | {"loss_mask": "bool"}


@pytest.mark.parametrize("seq_len", [100, 4096, 5000])
def test_evaluation_counts_every_target_once_and_pads_the_rest(
    prepared, opened, documents, stream, seq_len
):
    path = prepared("a", documents, "--validation_fraction=0.3")
    mixture = opened(path, split="validation", seq_len=seq_len)
    assert mixture.num_tokens + opened(path, seq_len=seq_len).num_tokens == len(stream)
    batches = list(
        eval_batches(mixture, batch_size=3, seq_len=seq_len, packing=EXAMPLES, rows=range(3))
    )
    whole = {name: np.concatenate([b[name] for b in batches]) for name in BATCH_KEYS}
    targets = whole["targets"][whole["loss_mask"]]
    held = mixture.manifests[0]["splits"]["validation"]["documents"]
    assert len(targets) == mixture.num_tokens - held  # all but each document's BOS
    assert (targets == EOS).sum() == held
    padding = whole["segment_ids"] == 0
    assert padding.sum() == padding.size - (mixture.num_tokens - 1)
    assert not whole["loss_mask"][padding].any()
    assert not whole["positions"][padding].any()


def test_evaluation_is_limited_and_split_by_rows(mixture):
    whole, *parts = (
        list(
            eval_batches(
                mixture, batch_size=6, seq_len=100, packing=EXAMPLES, rows=rows, max_batches=2
            )
        )
        for rows in (range(6), range(4), range(4, 6))
    )
    assert len(whole) == 2
    for i, batch in enumerate(whole):
        for name, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([p[i][name] for p in parts]), value)


def test_evaluation_of_a_mixture_starts_with_both_sources(prepared, opened):
    mixture = opened(prepared("a", ["a" * 5000]), prepared("b", ["b" * 5000]))
    first = next(eval_batches(mixture, batch_size=4, seq_len=100, packing=EXAMPLES, rows=range(4)))
    assert {ord("a"), ord("b")} <= set(first["tokens"].ravel().tolist())


def test_the_order_depends_on_the_seed_and_index_only(prepared, opened, documents):
    path = prepared("a", documents)
    one, same, other = (opened(path, seed=seed) for seed in (1, 1, 2))
    in_eights = sample_ids(one, start(one, batch_size=8), 0)
    assert sample_ids(same, start(same, batch_size=1), 7)[0] == in_eights[7]
    ids = [sample_ids(m, start(m, batch_size=50), 0).tolist() for m in (one, same, other)]
    assert ids[0] == ids[1] != ids[2]
    assert one.hash == same.hash != other.hash


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_batches_hold_the_samples_of_their_ids_with_any_threads_and_rows(
    mixture, stream, num_threads
):
    position, rows = start(mixture), range(1, 3)
    options = {"num_threads": num_threads, "prefetch": 6 if num_threads else 0}
    batches = train(mixture, position, first_step=3, rows=rows, **options)
    for step in range(3, 23):
        batch = next(batches)
        for row, sample in enumerate(sample_ids(mixture, position, step)[1:3]):
            check(batch, row, stream[sample * 100 : sample * 100 + 101], 100)
    batches.close()


def test_closing_ends_the_threads(mixture):
    before = set(threading.enumerate())
    batches = train(mixture, start(mixture), num_threads=3, prefetch=8)
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    batches.close()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_a_change_of_batch_size_continues_with_the_next_sample(mixture):
    position = start(mixture)
    changed = with_stages(position, [(0, {"batch_size": 10})], {}, step=5)
    steady = np.concatenate([sample_ids(mixture, position, s) for s in range(10)])
    both = [sample_ids(mixture, changed, s) for s in range(7)]
    assert [len(ids) for ids in both] == [4] * 5 + [10] * 2
    np.testing.assert_array_equal(np.concatenate(both), steady)
    batches = train(mixture, changed, rows=range(10), first_step=5)
    assert next(batches)["tokens"].shape == (10, 100)


def test_another_mixtures_position_is_refused(mixture):
    other = Position.start(batch_size=4, seq_len=100, mixture_hash="other")
    with pytest.raises(ValueError, match="another mixture"):
        train(mixture, other)


def test_weights_decide_the_shares_and_each_source_has_its_own_epochs(prepared, opened):
    a, b = prepared("a", ["a" * 2000]), prepared("b", ["b" * 9000])
    mixture = opened(a, b, weights=(3.0, 1.0))
    ids = sample_ids(mixture, start(mixture, batch_size=400), 0)
    from_a = ids[ids < 20]
    assert len(from_a) == 300
    assert [sorted(epoch) for epoch in from_a.reshape(15, 20)] == [list(range(20))] * 15
    source, number, _ = mixture.locate(int(ids[ids >= 20][0]), 100, EXAMPLES)
    assert (source.path, number) == (b, ids[ids >= 20][0] - 20)


def test_an_old_position_reads_in_the_old_order(mixture, stream, monkeypatch):
    monkeypatch.setattr(sample_order, "_WHOLE_UP_TO", 0)
    new = start(mixture)
    old = Position((dataclasses.replace(new.segments[0], rounds=4),))
    for position, rounds in ((old, 4), (new, 8)):
        ids = [mixture.order(100, EXAMPLES, rounds)[i] for i in range(4)]
        assert sample_ids(mixture, position, 0).tolist() == ids
        batch = next(train(mixture, position))
        assert [row.tolist() for row in batch["tokens"]] == [
            stream[100 * i : 100 * i + 100].tolist() for i in ids
        ]
    assert sample_ids(mixture, old, 0).tolist() != sample_ids(mixture, new, 0).tolist()
