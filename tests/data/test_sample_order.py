"""The endless order in both of its regimes: drawn whole, and computed entry by entry."""

import numpy as np
import pytest

from llamajax.data import sample_order
from llamajax.data.sample_order import EndlessOrder


@pytest.fixture(params=["whole", "by entry"])
def regime(request, monkeypatch):
    if request.param == "by entry":
        monkeypatch.setattr(sample_order, "_WHOLE_UP_TO", 0)


@pytest.mark.usefixtures("regime")
def test_epochs_are_permutations_without_a_pattern():
    count = 3000
    ids = EndlessOrder(10, count, key="k")
    epochs = np.array([ids[i] for i in range(3 * count)]).reshape(3, count)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10, 10 + count))
        assert abs(np.corrcoef(epoch, np.arange(count))[0, 1]) < 0.1
        assert abs(np.corrcoef(epoch[:-1], epoch[1:])[0, 1]) < 0.1
    assert (epochs[0] == epochs[1]).sum() < 20
    other = EndlessOrder(10, count, key="l")
    assert (epochs[0] == [other[i] for i in range(count)]).sum() < 20


def test_without_a_key_the_order_is_the_stored_one():
    ids = EndlessOrder(5, 4, key=None)
    assert [ids[i] for i in range(6)] == [5, 6, 7, 8, 5, 6]


def test_the_order_of_a_key_never_changes():
    """A golden order: a run resumed with a newer release must go on in the old order."""
    ids = EndlessOrder(0, 10, key="golden")
    golden = [3, 7, 1, 5, 9, 4, 6, 8, 2, 0, 2, 5, 9, 8, 1, 7, 4, 0, 3, 6]
    assert [ids[i] for i in range(20)] == golden


@pytest.mark.parametrize("count", [7_000_000, 244_000_000, 3_700_000_000])
def test_successive_samples_of_very_large_sets_are_uncorrelated(count):
    """4 rounds of the shuffle gave correlations of 0.08, 0.32 and 0.64 here."""
    ids = EndlessOrder(0, count, key="k")
    drawn = np.array([ids[i] for i in range(20_000)], float)
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.02
