"""Batches against a loop over tokens; the order of samples; rows, threads, padding."""

import dataclasses
import threading

import numpy as np
import pytest

from llamajax.data import (
    BATCH_KEYS,
    Position,
    eval_batches,
    open_mixture,
    sample_ids,
    sample_order,
    train_batches,
)
from llamajax.data.batches import make_batch

BOS, EOS = 256, 257


def reference(window: np.ndarray, seq_len: int, *, masked: bool) -> dict[str, np.ndarray]:
    """One sample from its at most T + 1 tokens, one target at a time."""
    names = ("tokens", "targets", "positions", "segment_ids", "loss_mask")
    sample = {name: np.zeros(seq_len, np.int64) for name in names}
    segment, position = 1, 0
    for t in range(len(window) - 1):
        if masked and t > 0 and window[t] == BOS:
            segment, position = segment + 1, 0
        values = (window[t], window[t + 1], position, segment, not masked or window[t + 1] != BOS)
        for name, value in zip(names, values, strict=True):
            sample[name][t] = value
        position += 1
    return sample


def start(mixture, *, batch_size: int = 4, seq_len: int = 100) -> Position:
    return Position.start(batch_size=batch_size, seq_len=seq_len, mixture_hash=mixture.hash)


def train(mixture, position: Position, *, rows: range = range(4), first_step: int = 0, **options):
    options = {"num_threads": 0, "prefetch": 0} | options
    return train_batches(mixture, position, first_step=first_step, rows=rows, **options)


def check(batch, row: int, window: np.ndarray, seq_len: int, *, masked: bool) -> None:
    expected = reference(window, seq_len, masked=masked)
    counted = expected["segment_ids"] > 0
    for name, values in expected.items():
        got = batch[name][row]
        where = counted if name in ("tokens", "targets") else slice(None)
        np.testing.assert_array_equal(got[where], values[where], err_msg=name)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("seq_len", [1, 7, 100, 1365, 4095, 4096, 4097, 8192, 9001])
def test_samples_are_the_stream_cut_at_the_sequence_length(
    prepared, config, documents, stream, seq_len, masked
):
    path = prepared("a", documents)
    data = config(path, seq_len=seq_len, shuffle=False, mask_documents=masked)
    mixture = open_mixture(data, split="train", vocab_size=258)
    assert mixture.num_samples(seq_len) == (len(stream) - 1) // seq_len
    with_all = range(min(300, mixture.num_samples(seq_len)))
    batch = next(train(mixture, start(mixture, batch_size=999, seq_len=seq_len), rows=with_all))
    for row in with_all:
        window = stream[row * seq_len : row * seq_len + seq_len + 1]
        check(batch, row, window, seq_len, masked=masked)
    assert set(batch) == set(BATCH_KEYS)
    dtypes = {k: str(v.dtype) for k, v in batch.items()}
    assert dtypes.pop("loss_mask") == "bool"
    assert set(dtypes.values()) == {"int32"}


@pytest.mark.parametrize("seq_len", [100, 4096, 5000])
def test_evaluation_counts_every_target_once_and_pads_the_rest(
    prepared, config, documents, stream, seq_len
):
    path = prepared("a", documents, "--validation_fraction=0.3")
    train_mixture = open_mixture(config(path, seq_len=seq_len), split="train", vocab_size=258)
    mixture = open_mixture(config(path, seq_len=seq_len), split="validation", vocab_size=258)
    assert mixture.num_tokens + train_mixture.num_tokens == len(stream)
    batches = list(eval_batches(mixture, batch_size=3, seq_len=seq_len, rows=range(3)))
    mask = np.concatenate([b["loss_mask"] for b in batches])
    targets = np.concatenate([b["targets"] for b in batches])[mask]
    held = mixture.manifests[0]["splits"]["validation"]["documents"]
    assert len(targets) == mixture.num_tokens - held  # all but each document's BOS
    assert (targets == EOS).sum() == held
    segments = np.concatenate([b["segment_ids"] for b in batches])
    padding = segments == 0
    assert padding.sum() == segments.size - (mixture.num_tokens - 1)
    assert not mask[padding].any()
    positions = np.concatenate([b["positions"] for b in batches])
    assert not positions[padding].any()


def test_evaluation_is_limited_and_split_by_rows(prepared, config, documents):
    mixture = open_mixture(config(prepared("a", documents)), split="train", vocab_size=258)
    whole = list(eval_batches(mixture, batch_size=6, seq_len=100, rows=range(6), max_batches=2))
    parts = [
        list(eval_batches(mixture, batch_size=6, seq_len=100, rows=r, max_batches=2))
        for r in (range(4), range(4, 6))
    ]
    assert len(whole) == 2
    for i, batch in enumerate(whole):
        for name, value in batch.items():
            joined = np.concatenate([p[i][name] for p in parts])
            np.testing.assert_array_equal(joined, value)


def test_evaluation_of_a_mixture_starts_with_both_sources(prepared, config):
    a, b = prepared("a", ["a" * 5000]), prepared("b", ["b" * 5000])
    mixture = open_mixture(config(a, b), split="train", vocab_size=258)
    first = next(eval_batches(mixture, batch_size=4, seq_len=100, rows=range(4)))
    assert {ord("a"), ord("b")} <= set(first["tokens"].ravel().tolist())


def test_every_epoch_is_another_permutation_of_all_samples(prepared, config, documents):
    mixture = open_mixture(config(prepared("a", documents)), split="train", vocab_size=258)
    count = mixture.num_samples(100)
    ids = sample_ids(mixture, start(mixture, batch_size=3 * count), 0).reshape(3, count)
    for epoch in ids:
        assert sorted(epoch) == list(range(count))
    assert (ids[0] == ids[1]).mean() < 0.1
    assert (ids[1] == ids[2]).mean() < 0.1
    assert (np.diff(ids[0]) == 1).mean() < 0.1


def test_the_order_depends_on_the_seed_and_index_only(prepared, config, documents):
    path = prepared("a", documents)
    mixtures = [
        open_mixture(config(path, seed=s), split="train", vocab_size=258) for s in (1, 1, 2)
    ]
    by_one = [sample_ids(m, start(m, batch_size=1), 7)[0] for m in mixtures]
    in_eights = sample_ids(mixtures[0], start(mixtures[0], batch_size=8), 0)
    assert by_one[0] == by_one[1] == in_eights[7]
    ids = [sample_ids(m, start(m, batch_size=50), 0).tolist() for m in mixtures]
    assert ids[0] == ids[1] != ids[2]
    assert mixtures[0].hash == mixtures[1].hash != mixtures[2].hash


def test_batches_hold_the_samples_that_the_ids_name(prepared, config, documents, stream):
    mixture = open_mixture(config(prepared("a", documents)), split="train", vocab_size=258)
    position = start(mixture)
    batch = next(train(mixture, position, first_step=5))
    for row, sample in enumerate(sample_ids(mixture, position, 5)):
        check(batch, row, stream[sample * 100 : sample * 100 + 101], 100, masked=True)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_threads_and_rows_change_nothing(prepared, config, documents, num_threads):
    mixture = open_mixture(config(prepared("a", documents)), split="train", vocab_size=258)
    position = start(mixture)
    plain = train(mixture, position, first_step=3)
    threads = train(
        mixture, position, first_step=3, rows=range(1, 3), num_threads=num_threads, prefetch=6
    )
    for _ in range(20):
        expected, got = next(plain), next(threads)
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name][1:3])
    threads.close()


def test_closing_ends_the_threads(prepared, config, documents):
    mixture = open_mixture(config(prepared("a", documents)), split="train", vocab_size=258)
    before = set(threading.enumerate())
    batches = train(mixture, start(mixture), num_threads=3, prefetch=8)
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    batches.close()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_a_change_of_batch_size_goes_on_with_the_next_sample(prepared, config, documents):
    mixture = open_mixture(config(prepared("a", documents)), split="train", vocab_size=258)
    position = start(mixture)
    changed = position.continued(step=5, batch_size=10, seq_len=100, mixture_hash=mixture.hash)
    steady = np.concatenate([sample_ids(mixture, position, s) for s in range(10)])
    both = [sample_ids(mixture, changed, s) for s in range(7)]
    assert [len(ids) for ids in both] == [4] * 5 + [10] * 2
    np.testing.assert_array_equal(np.concatenate(both), steady)
    batches = train(mixture, changed, rows=range(10), first_step=5)
    assert next(batches)["tokens"].shape == (10, 100)


def test_another_mixtures_position_is_refused(prepared, config, documents):
    mixture = open_mixture(config(prepared("a", documents)), split="train", vocab_size=258)
    other = Position.start(batch_size=4, seq_len=100, mixture_hash="other")
    with pytest.raises(ValueError, match="another mixture"):
        train(mixture, other)


def test_weights_decide_the_shares_and_each_source_has_its_own_epochs(prepared, config):
    a, b = prepared("a", ["a" * 2000]), prepared("b", ["b" * 9000])
    mixture = open_mixture(config(a, b, weights=(3.0, 1.0)), split="train", vocab_size=258)
    ids = sample_ids(mixture, start(mixture, batch_size=400), 0)
    from_a = ids[ids < 20]
    assert len(from_a) == 300
    for epoch in from_a.reshape(15, 20):
        assert sorted(epoch) == list(range(20))
    source, number = mixture.locate(int(ids[ids >= 20][0]), 100)
    assert source.path == b
    assert number < 90


def test_an_old_position_reads_in_the_old_order(config, prepared, documents, monkeypatch):
    monkeypatch.setattr(sample_order, "_WHOLE_UP_TO", 0)
    mixture = open_mixture(config(prepared("a", documents)), split="train", vocab_size=258)
    new = Position.start(batch_size=8, seq_len=100, mixture_hash=mixture.hash)
    old = Position((dataclasses.replace(new.segments[0], rounds=4),))
    found = [sample_ids(mixture, position, 0).tolist() for position in (old, new)]
    expected = [[mixture.order(100, rounds)[i] for i in range(8)] for rounds in (4, 8)]
    assert found == expected
    assert found[0] != found[1]
    for position, ids in zip((old, new), found, strict=True):
        batch = next(train_batches(mixture, position, first_step=0, rows=range(8), num_threads=1,
                                   prefetch=1))  # fmt: skip
        starts = [mixture.locate(i, 100) for i in ids]
        wanted = make_batch(starts, 100, mask_documents=True)
        assert (batch["tokens"] == wanted["tokens"]).all()
