"""The ledger of samples: one digest for every way to a step; another order is noticed."""

import hashlib
import json

import pytest

from llamajax.data import Ledger, Position, check_ledger, with_stages
from llamajax.data import ledger as module
from llamajax.errors import UserError

STEPS = 70  # more than are checked; several epochs


def begin(mixture, batch_size: int = 4) -> Position:
    return Position.start(batch_size=batch_size, seq_len=100, mixture_hash=mixture.hash)


def ledger_of(mixture, position, steps: int, *, start: int = 0, saved=None):
    ledger = Ledger({mixture.hash: mixture}, position, step=start, saved=saved)
    for step in range(start + 1, steps + 1):
        ledger.add(step)
    return json.loads(json.dumps(ledger.to_json()))


def test_a_resumed_ledger_equals_an_undisturbed_one(mixture):
    whole = ledger_of(mixture, begin(mixture), STEPS)
    half = ledger_of(mixture, begin(mixture), 41)
    assert ledger_of(mixture, begin(mixture), STEPS, start=41, saved=half) == whole
    # A digest depends on all that came before:
    digests = [half["digest"], ledger_of(mixture, begin(mixture), STEPS, start=41)["digest"]]
    assert whole["digest"] not in digests


def test_a_large_batch_is_hashed_by_rows_spread_over_it(mixture, monkeypatch):
    asked, sample_ids = [], module.sample_ids

    def recorded(*args, **kwargs):
        asked.append(sample_ids(*args, **kwargs))
        return asked[-1]

    monkeypatch.setattr(module, "sample_ids", recorded)
    saved = ledger_of(mixture, begin(mixture, 400), 3)
    assert [len(ids) for ids in asked] == [58, 58, 58]
    assert asked[2].tolist() == sample_ids(mixture, begin(mixture, 400), 2)[::7].tolist()
    assert check_ledger(saved, {mixture.hash: mixture}, begin(mixture, 400), step=3) == 3


def test_a_ledger_of_an_earlier_release_is_checked_by_all_rows_and_continued(mixture):
    """Its steps hashed every row, whatever the batch size, and it did not say so."""
    position = begin(mixture, 400)
    digests = [""]
    for step in range(9):
        ids = module.sample_ids(mixture, position, step).astype("<i8").tobytes()
        before = bytes.fromhex(digests[-1])
        digests.append(hashlib.blake2b(before + ids, digest_size=16).hexdigest())
    old = {"digest": digests[-1], "recent": [list(entry) for entry in enumerate(digests[:-1])]}
    assert check_ledger(old, {mixture.hash: mixture}, position, step=9) == 9
    continued = ledger_of(mixture, position, 12, start=9, saved=old)
    assert check_ledger(continued, {mixture.hash: mixture}, position, step=12) == 12
    with pytest.raises(UserError, match="samples of steps 1 to 9 are not those"):
        check_ledger(old | {"digest": digests[-2]}, {mixture.hash: mixture}, position, step=9)


def test_the_same_order_is_confirmed_and_another_refused(mixture, monkeypatch):
    for steps, checked in ((3, 3), (STEPS, 32)):
        saved = ledger_of(mixture, begin(mixture), steps)
        assert check_ledger(saved, {mixture.hash: mixture}, begin(mixture), step=steps) == checked
    shuffled = module.sample_ids
    monkeypatch.setattr(module, "sample_ids", lambda *a, **k: shuffled(*a, **k)[::-1])
    with pytest.raises(UserError, match="samples of steps 39 to 70 are not those"):
        check_ledger(saved, {mixture.hash: mixture}, begin(mixture), step=STEPS)


def test_changes_that_the_position_knows_are_no_error(mixture, opened):
    saved = ledger_of(mixture, begin(mixture), 10)
    other = opened(mixture.sources[0].path, seed=12)
    assert check_ledger(saved, {other.hash: other}, begin(mixture), step=10) == 0
    # A larger batch from step 10 on: the steps before are checked as they were read.
    changed = with_stages(begin(mixture), [(0, {"batch_size": 6})], {}, step=10)
    later = ledger_of(mixture, changed, 14, start=10, saved=saved)
    assert check_ledger(later, {mixture.hash: mixture}, changed, step=14) == 4
