"""Windows of token ids to score: which tokens are predicted, from which ones before them.

A *window* is (begin, first_target, end): the model reads ids[begin:end - 1] from position 0, and of
its predictions those of ids[first_target:end] count. Windows are in the order of the text, so the
scored tokens of all rows, one row after the other, are those of the text.
"""

import numpy as np

from llamajax.evaluation.continuations import Continuation, ContinuationRows


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


def window_rows(ids: np.ndarray, windows: np.ndarray) -> ContinuationRows:
    """Return windows (R, 3) of a stream of ids as rows, all as long as the longest."""
    found = [Continuation(ids[begin:end], end - first) for begin, first, end in windows.tolist()]
    return ContinuationRows(found, max(len(each.ids) for each in found) - 1, packed=False)
