"""How a stream of tokens becomes samples: cut into windows, or packed by whole examples.

A sample of length T is a list of *pieces* of the stream, in one row of T + 1 tokens: T inputs and T
targets, sharing all but one. A window is one piece. A row of whole examples has a piece for each
example, and padding after them; of an example over T + 1 tokens each piece shares one token with
the next.

Rows are filled with the longest examples first, each into the row with the most room. Best fit (the
least room) needs fewer rows, but puts a hundred short examples into one and two long ones into
another. So a batch would have very unequal numbers of targets, and more documents than a cuDNN
kernel takes. It is used where it saves over 1 % of the rows.

Rows are a function of the lengths of the examples, T, and a key. Examples of one length are
interchangeable: which of them share a row follows the key, not their order in the file.
"""

import functools
import hashlib
import itertools

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


class ExampleRows:
    """Samples of whole examples, in the order of the longest example in each.

    lengths: of the examples in the stream, one after the other. key: of the order of examples of
    the same length; None for that of the stream. efficiency: share of the T positions of a row that
    hold tokens.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int, key: str | None) -> None:
        self._num_tokens = int(lengths.sum())
        first, sizes = _pieces(lengths, seq_len)
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


def _pieces(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Return first token and size of the pieces of all examples; those that fit are one piece."""
    counts = np.maximum(1, -(-(lengths - 1) // seq_len))
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(np.cumsum(lengths) - lengths, counts)
    sizes = np.minimum(np.repeat(lengths, counts) - number * seq_len, seq_len + 1)
    return starts + number * seq_len, sizes


def _draws(key: str | None, count: int) -> np.ndarray:
    if key is None:
        return np.arange(count)
    # As in `EndlessOrder`: raw bits are the same in every release of NumPy.
    seed = hashlib.blake2b(f"rows:{key}".encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(seed, "little")).random_raw(count)


def cut_examples(sizes: np.ndarray, seq_len: int, packing: str) -> np.ndarray:
    """Count the examples that no sample holds whole, and their tokens that carry loss, (2,).

    sizes: tokens of each example and how many carry loss, (examples, 2).
    """
    lengths = sizes[:, 0]
    room = seq_len + 1
    if packing == WINDOWS:
        room -= (np.cumsum(lengths) - lengths) % seq_len
    is_cut = lengths > room
    return np.array([is_cut.sum(), sizes[is_cut, 1].sum()])


def packing_facts(sizes: np.ndarray, seq_len: int) -> dict[str, float]:
    """Return what the manifest says of whole examples in rows of this length. sizes: as above."""
    cut, learned = cut_examples(sizes, seq_len, EXAMPLES).tolist()
    efficiency = ExampleRows(sizes[:, 0], seq_len, None).efficiency
    return {"efficiency": efficiency, "cut_examples": cut, "cut_loss_tokens": learned}


def fill_rows(sizes: np.ndarray, capacity: int, *, evenly: bool) -> np.ndarray:
    """Return the row of each piece: one where it fits, or a new one where it fits nowhere.

    sizes: falling, each at most `capacity`. evenly: choose the row with the most room, of as many
    as all tokens need at least; rows then hold about as many pieces. Otherwise the one with the
    least room (best fit), which needs the fewest rows.
    """
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = num_rows = 0  # bit r of rooms: there are rows with room for r tokens

    def add(rows: list[int], room: int) -> None:
        nonlocal rooms
        by_room[room] += rows
        rooms |= bool(rows) << room

    if evenly:
        num_rows = -(-int(sizes.sum()) // capacity)
        add(list(range(num_rows)), capacity)
    found = [np.empty(0, np.int64)]
    for size, group in itertools.groupby(sizes.tolist()):
        left = sum(1 for _ in group)
        while left:
            if not rooms >> size:
                new = -(-left // (capacity // size))
                add(list(range(num_rows, num_rows + new)), capacity)
                num_rows += new
            fitting = rooms >> size
            room, each = rooms.bit_length() - 1, 1
            if not evenly:  # after a piece the next one of this size fits best into the same row
                room = size + (fitting & -fitting).bit_length() - 1
                each = min(room // size, left)
            rows = by_room[room][-(left // each) :]
            del by_room[room][-len(rows) :]
            rooms ^= (not by_room[room]) << room
            found.append(np.repeat(rows, each))
            left -= each * len(rows)
            add(rows, room - each * size)
    return np.concatenate(found)
