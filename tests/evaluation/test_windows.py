"""Every token but the first is predicted exactly once, from what the protocol says."""

import numpy as np
import pytest

from llamajax.evaluation.continuations import ContinuationRows
from llamajax.evaluation.windows import non_overlapping, separate, sliding_window, window_rows


def scored(rows: ContinuationRows, batch_size: int) -> list[tuple[int, tuple[int, ...]]]:
    """(target, tokens before it that are seen) of every scored token, in order."""
    found = []
    for first in range(0, rows.num_rows, batch_size):
        batch = rows.batch(range(first, first + batch_size))
        for row, column in np.argwhere(batch["loss_mask"]):
            seen = batch["tokens"][row, : column + 1]
            assert batch["positions"][row, : column + 1].tolist() == list(range(column + 1))
            found.append((int(batch["targets"][row, column]), tuple(seen.tolist())))
    return found


def hugging_face(ids: np.ndarray, seq_len: int, stride: int) -> list[tuple[int, tuple[int, ...]]]:
    """The same by the loop of Hugging Face's guide, whose model shifts the labels by one."""
    found, scored_to = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + seq_len, len(ids))
        labels = [-100] * (end - begin)
        for place in range(max(scored_to, begin), end):
            labels[place - begin] = int(ids[place])
        for place in range(1, end - begin):
            if labels[place] != -100:
                found.append((labels[place], tuple(ids[begin : begin + place].tolist())))
        scored_to = end
        if end == len(ids):
            break
    return found


@pytest.mark.parametrize("num_tokens", [2, 7, 8, 9, 16, 17, 41])
@pytest.mark.parametrize(("seq_len", "stride"), [(8, 4), (8, 7), (8, 1), (2, 1), (64, 32)])
def test_sliding_windows_are_those_of_hugging_faces_guide(num_tokens, seq_len, stride):
    ids = np.arange(100, 100 + num_tokens)
    found = scored(window_rows(ids, sliding_window(num_tokens, seq_len, stride)), batch_size=3)
    assert found == hugging_face(ids, seq_len, stride)
    assert [target for target, _ in found] == ids[1:].tolist()


# Tokens with the prefix, window, and (begin, first target, end) of each of the harness's windows:
# get_rolling_token_windows(context_len=1) of lm-evaluation-harness 0.4.13, 2026-11-29.
HARNESS = [
    (100, 64, [(0, 1, 65), (35, 65, 100)]),
    (10, 8, [(0, 1, 9), (1, 9, 10)]),
    (9, 8, [(0, 1, 9)]),
    (18, 8, [(0, 1, 9), (8, 9, 17), (9, 17, 18)]),
    (6, 8, [(0, 1, 6)]),
    (4, 1, [(0, 1, 2), (1, 2, 3), (2, 3, 4)]),
]


@pytest.mark.parametrize(("num_tokens", "seq_len", "windows"), HARNESS)
def test_windows_that_do_not_overlap_are_the_harness_rolling_ones(num_tokens, seq_len, windows):
    assert non_overlapping(num_tokens, seq_len).tolist() == [list(w) for w in windows]
    ids = np.arange(100, 100 + num_tokens)
    found = scored(window_rows(ids, non_overlapping(num_tokens, seq_len)), batch_size=3)
    expected = [
        (100 + place, tuple(range(100 + begin, 100 + place)))
        for begin, first, end in windows
        for place in range(first, end)
    ]
    assert found == expected


def test_rows_of_an_array_are_separate():
    ids = np.arange(15)
    found = scored(window_rows(ids, separate(3, 5)), batch_size=2)
    assert found == [
        (5 * r + t, tuple(range(5 * r, 5 * r + t))) for r in range(3) for t in (1, 2, 3, 4)
    ]
