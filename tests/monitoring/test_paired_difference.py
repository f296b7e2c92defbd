"""Two runs on the same samples: chance is not called a difference, an effect is found."""

import numpy as np
import pytest
from workdirs import write_rows

from llamajax.monitoring.paired_difference import describe_comparison, paired_difference

ROWS = 512
TRIALS = 400
STEPS = range(11, 11 + ROWS)


def chance(correlated_over: float, noise: float) -> np.ndarray:
    """Differences of runs that are alike, (trials, rows): how they drift apart by chance."""
    rng = np.random.default_rng(int(correlated_over + noise))
    stays, drift = np.exp(-1 / correlated_over), np.zeros((TRIALS, ROWS))
    pushes = np.sqrt(1 - stays**2) * rng.standard_normal((TRIALS, ROWS))
    for n in range(1, ROWS):
        drift[:, n] = stays * drift[:, n - 1] + pushes[:, n]
    return drift + noise * rng.standard_normal((TRIALS, ROWS))


@pytest.mark.parametrize(
    ("correlated_over", "noise"), [(0.01, 0), (5, 0), (ROWS / 10, 0), (ROWS / 3, 5)]
)
def test_chance_is_called_a_difference_in_at_most_5_percent(correlated_over, noise):
    found = [paired_difference(STEPS, d) for d in chance(correlated_over, noise)]
    assert sum(d.since is not None for d in found) <= 0.05 * TRIALS
    assert np.mean([d.low < 0 < d.high for d in found]) >= 0.95


def test_an_effect_is_found_early_with_its_sign_and_size():
    rng = np.random.default_rng(3)
    effect = -0.02 * (1 - np.exp(-np.arange(ROWS) / 10))
    found = paired_difference(STEPS, effect + 0.003 * rng.standard_normal(ROWS))
    assert found.low < -0.02 < found.high < 0
    assert (found.first_step, found.last_step, found.since) == (267, 522, STEPS[63])
    assert "A is better, seen from step 74 on" in found.words("A", "B")
    assert paired_difference(STEPS, [0.0] * ROWS).since is None


SEGMENT = {"first_step": 0, "first_sample": 0, "batch_size": 8, "seq_len": 4, "rounds": 8}
LATER = SEGMENT | {"first_step": 110, "first_sample": 880, "batch_size": 16}


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ([SEGMENT], "b is better"),
        # a segment that changes nothing, and one after the last row
        ([SEGMENT, SEGMENT | {"first_step": 9, "first_sample": 72}], "b is better"),
        ([SEGMENT, LATER], "b is better"),
        ([SEGMENT, LATER | {"first_step": 20}], "read other samples at the same steps"),
        ([SEGMENT | {"first_sample": 8}], "read other samples at the same steps"),
        ([], "does not say which samples"),
        ([{"first_step": 0}], "does not say which samples"),
        ([SEGMENT | {"first_step": 300}], "does not say which samples"),
    ],
)
def test_only_runs_that_read_the_same_samples_are_paired(tmp_path, segments, words):
    for name, position, better in (("a", [SEGMENT], 0.0), ("b", segments, 0.1)):
        folder = tmp_path / name
        rows = ({"step": n, "loss": 3 - better + n % 7 * 1e-3 * better} for n in range(1, 101))
        write_rows(folder / "metrics.jsonl", *rows)
        event = {"event": "restore", "step": 0, "time_s": 1.0, "position": position}
        write_rows(folder / "events.jsonl", event)
    paths = [str(tmp_path / name) for name in "ab"]
    assert words in describe_comparison(*paths, names=["a", "b"])
