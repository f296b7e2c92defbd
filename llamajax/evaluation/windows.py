"""Windows of token ids to score: which tokens are predicted, from which ones before them.

A *window* is (begin, first_target, end): the model reads ids[begin:end - 1] from position 0, and of
its predictions those of ids[first_target:end] count. Windows are in the order of the text, so the
scored tokens of all rows, one row after the other, are those of the text.
"""

import numpy as np


def non_overlapping(num_tokens: int, seq_len: int) -> np.ndarray:
    """Windows (R, 3) that share one token: each reads `seq_len` tokens and predicts the next ones.

    The first token of a window is context alone; it was the last target of the window before. The
    last window is filled with context from before it. This is the rolling log-likelihood of
    EleutherAI's lm-evaluation-harness with a context of one.
    """
    first = np.arange(0, num_tokens - 1, seq_len)
    end = np.minimum(first + seq_len + 1, num_tokens)
    return np.stack([np.maximum(end - seq_len - 1, 0), first + 1, end], axis=1)


def sliding_window(num_tokens: int, seq_len: int, stride: int) -> np.ndarray:
    """Windows (R, 3) of `seq_len` tokens that begin every `stride` ones, 1 <= stride < seq_len.

    Each scores what no window before it scored, with at least seq_len - stride tokens of context:
    the loop of Hugging Face's guide to the perplexity of fixed-length models.
    """
    count = 1 + max(0, -(-(num_tokens - seq_len) // stride))
    begin = np.arange(count) * stride
    end = np.minimum(begin + seq_len, num_tokens)
    return np.stack([begin, np.concatenate([[1], end[:-1]]), end], axis=1)


def separate(num_rows: int, length: int) -> np.ndarray:
    """Windows (R, 3) of the rows of an array (R, length), each by itself."""
    begin = np.arange(num_rows) * length
    return np.stack([begin, begin + 1, begin + length], axis=1)


class WindowRows:
    """The windows of a stream of ids as rows of batches (B, T), T that of the longest."""

    def __init__(self, ids: np.ndarray, windows: np.ndarray) -> None:
        self._ids, self._windows = ids, windows
        self.num_rows = len(windows)
        self.seq_len = int((windows[:, 2] - windows[:, 0]).max()) - 1

    def batch(self, rows: range) -> dict[str, np.ndarray]:
        """Return these rows as arrays (B, T); those from `num_rows` on are padding.

        Only tokens with a true `loss_mask` are scored. Padding comes after a row's tokens, where
        causal attention does not see it.
        """
        shape = (len(rows), self.seq_len)
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets")}
        batch["positions"] = np.tile(np.arange(self.seq_len, dtype=np.int32), (len(rows), 1))
        batch["loss_mask"] = np.zeros(shape, bool)
        for row, number in enumerate(rows):
            if number >= self.num_rows:
                break
            begin, first_target, end = self._windows[number]
            inputs = end - begin - 1
            batch["tokens"][row, :inputs] = self._ids[begin : end - 1]
            batch["targets"][row, :inputs] = self._ids[begin + 1 : end]
            batch["loss_mask"][row, first_target - begin - 1 : inputs] = True
        return batch
