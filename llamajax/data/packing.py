"""How a stream of tokens becomes samples: cut into windows, or packed by whole examples.

A sample of length T is a list of *pieces* of the stream, in one row of T + 1 tokens: T inputs and T
targets, sharing all but one. A window is one piece. A row of whole examples has a piece for each
example, and padding after them. An example over T + 1 tokens is cut into pieces that share one
token with the next; those without a target that carries loss are left out.

Rows are filled with the longest examples first, each into the row with the most room. Best fit (the
least room) needs fewer rows, but puts a hundred short examples into one and two long ones into
another. So a batch would have very unequal numbers of targets, and more documents than a cuDNN
kernel takes. It is used where it saves over 1 % of the rows.

Rows are a function of the lengths of the examples, T, and a key. Examples of one length are
interchangeable: which of them share a row follows the key, not their order in the file.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable

import numpy as np

EXAMPLES, WINDOWS = "examples", "windows"
_MORE_ROWS = 0.01  # than by best fit, at most


class Windows:
    """Sample j is the tokens [j*T, j*T + T] of a stream.

    count: of whole samples. count_all: of those that make every token but the first a target once;
    the last may need padding.
    """

    def __init__(self, num_tokens: int, seq_len: int) -> None:
        self._num_tokens, self._seq_len = num_tokens, seq_len
        self.count = (num_tokens - 1) // seq_len
        self.count_all = -(-(num_tokens - 1) // seq_len)
        self.digest, self.efficiency = b"", 1.0

    def pieces(self, number: int) -> np.ndarray:
        """Return first token in the stream and number of tokens of each piece, (pieces, 2)."""
        first = number * self._seq_len
        return np.array([[first, min(self._seq_len + 1, self._num_tokens - first)]])

    def tokens(self, count: int) -> int:
        """Return how far into the stream the first samples reach, in tokens over all epochs."""
        return count * self._seq_len

    def after(self, tokens: int) -> int:
        """Return the number of the first sample after so many tokens, the reverse of `tokens`."""
        return -(-tokens // self._seq_len)


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """The examples of a stream, one after the other.

    lengths: in tokens, (examples,). spans: where the tokens that carry loss begin and end in the
    stream, (spans, 2).
    """

    lengths: np.ndarray
    spans: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """The first token of each example in the stream."""
        return np.cumsum(self.lengths) - self.lengths

    def loss_tokens(self, first: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Count the tokens that carry loss in each part [first, end) of the stream."""
        return self._loss_tokens_before(end) - self._loss_tokens_before(first)

    def _loss_tokens_before(self, tokens: np.ndarray) -> np.ndarray:
        begins, ends = np.concatenate([np.zeros((1, 2), np.int64), self.spans]).T
        last = np.searchsorted(begins[1:], tokens)  # span that begins before the token
        return np.cumsum(ends - begins)[last] - np.maximum(0, ends[last] - tokens)


def loss_spans(answer: np.ndarray, first: int) -> np.ndarray:
    """Return `Examples.spans` of a part of the stream. first: its first token in the stream."""
    edges = np.flatnonzero(np.diff(answer, prepend=False, append=False))
    return edges.reshape(-1, 2) + first


class ExampleRows:
    """Samples of whole examples, in the order of the longest example in each.

    key: of the order of examples of the same length; None for that of the stream. efficiency: share
    of the T positions of a row that hold tokens.
    """

    def __init__(self, examples: Examples, seq_len: int, key: str | None) -> None:
        self._num_tokens = int(examples.lengths.sum())
        first, sizes = _pieces(examples, seq_len)
        order = np.lexsort((_draws(key, len(sizes)), -sizes))
        rows = fill_rows(sizes[order], seq_len + 1, evenly=True)
        best = fill_rows(sizes[order], seq_len + 1, evenly=False)
        if rows.max() > (1 + _MORE_ROWS) * best.max():
            rows = best
        _, opens = np.unique(rows, return_index=True)
        rank = np.empty(len(opens), np.int64)
        rank[np.argsort(first[order][opens])] = np.arange(len(opens))
        rows = rank[rows]
        kept = np.lexsort((first[order], rows))  # within a row in the order of the stream
        self._table = np.stack([first[order][kept], sizes[order][kept]], axis=1)
        self._ends = np.searchsorted(rows[kept], np.arange(len(opens)), side="right")
        self.count = self.count_all = len(opens)
        inputs = sizes.sum() - self.count  # the last token of a row is only a target
        self.efficiency = float(inputs / (self.count * seq_len))

    @functools.cached_property
    def digest(self) -> bytes:
        """Identity of the samples; empty for windows."""
        return hashlib.blake2b(
            self._table.tobytes() + self._ends.tobytes(), digest_size=16
        ).digest()

    def pieces(self, number: int) -> np.ndarray:
        """Return first token in the stream and number of tokens of each piece, (pieces, 2)."""
        begin = self._ends[number - 1] if number else 0
        return self._table[begin : self._ends[number]]

    def tokens(self, count: int) -> int:
        """Return how far the first samples reach: the share of an epoch, in tokens of the stream.

        Rows of any length have the tokens of all epochs in common, so that a change of the length
        keeps the number of epochs.
        """
        return count * self._num_tokens // self.count

    def after(self, tokens: int) -> int:
        """Return the number of the first sample after so many tokens, the reverse of `tokens`."""
        return -(-tokens * self.count // self._num_tokens)


def _pieces(examples: Examples, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Return first token and size of the pieces; examples that fit are one piece.

    Pieces of a longer one without a target that carries loss are left out.
    """
    counts = np.maximum(1, -(-(examples.lengths - 1) // seq_len))
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets *= seq_len
    first = np.repeat(examples.starts, counts) + offsets
    sizes = np.minimum(np.repeat(examples.lengths, counts) - offsets, seq_len + 1)
    kept = (examples.loss_tokens(first + 1, first + sizes) > 0) | np.repeat(counts == 1, counts)
    return first[kept], sizes[kept]


def _draws(key: str | None, count: int) -> np.ndarray:
    if key is None:
        return np.arange(count)
    # As in `EndlessOrder`: raw bits are the same in every release of NumPy.
    seed = hashlib.blake2b(f"rows:{key}".encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(seed, "little")).random_raw(count)


def cut_shares(parts: Iterable[Examples], seq_len: int, packing: str) -> dict[str, float]:
    """Return what no sample holds whole: shares of the examples, and of tokens that carry loss."""
    is_cut, learned = [], []
    for examples in parts:
        lengths, starts = examples.lengths, examples.starts
        begin = starts % seq_len if packing == WINDOWS else 0  # in a sample
        is_cut.append(begin + lengths > seq_len + 1)
        learned.append(examples.loss_tokens(starts, starts + lengths))
    cut, tokens = np.concatenate(is_cut), np.concatenate(learned)
    return {
        "cut_examples_share": float(cut.mean()),
        "cut_loss_share": float(tokens[cut].sum() / max(1, tokens.sum())),
    }


def packing_facts(examples: Examples, seq_len: int) -> dict[str, float]:
    """Return what the manifest says of whole examples in rows of this length."""
    efficiency = ExampleRows(examples, seq_len, None).efficiency
    return {"efficiency": efficiency} | cut_shares([examples], seq_len, EXAMPLES)


def fill_rows(sizes: np.ndarray, capacity: int, *, evenly: bool) -> np.ndarray:
    """Return the row of each piece: one where it fits, or a new one where it fits nowhere.

    sizes: falling, each at most `capacity`. evenly: choose the row with the most room, of as many
    as all tokens need at least; rows then hold about as many pieces. Otherwise the one with the
    least room (best fit), which needs the fewest rows.
    """
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    nonempty_rooms = num_rows = 0  # bit r: there are rows with room for r tokens

    def put(rows: Iterable[int], room: int) -> None:
        nonlocal nonempty_rooms
        rows_by_room[room] += rows
        nonempty_rooms |= bool(rows_by_room[room]) << room

    def take(room: int, count: int) -> list[int]:
        """Return the last rows with this room, at most `count`, and remove them."""
        nonlocal nonempty_rooms
        rows = rows_by_room[room][-count:]
        del rows_by_room[room][-count:]
        nonempty_rooms ^= (not rows_by_room[room]) << room
        return rows

    if evenly:
        num_rows = -(-int(sizes.sum()) // capacity)
        put(range(num_rows), capacity)
    found = [np.empty(0, np.int64)]
    for size, group in itertools.groupby(sizes.tolist()):
        left = sum(1 for _ in group)
        while left:
            if not nonempty_rooms >> size:
                new = -(-left // (capacity // size))
                put(range(num_rows, num_rows + new), capacity)
                num_rows += new
            fitting = nonempty_rooms >> size
            room, each = nonempty_rooms.bit_length() - 1, 1
            if not evenly:  # after a piece the next one of this size fits best into the same row
                room = size + (fitting & -fitting).bit_length() - 1
                each = min(room // size, left)
            rows = take(room, left // each)
            found.append(np.repeat(rows, each))
            left -= each * len(rows)
            put(rows, room - each * size)
    return np.concatenate(found)
