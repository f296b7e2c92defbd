"""Read prepared documents in order, or an even sample of them, some at a time."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from llamajax.data.prepared_split import PreparedSplit
from llamajax.data.shards import BLOCK_TOKENS
from llamajax.tokenizers import Tokenizer

_GROUP_BLOCKS = 64  # read at a time: 262,144 tokens
_RUN_GROUPS = 8  # of a sample, successive groups
_SHOWN_TOKENS = 40
MAX_DOCUMENT = 1 << 22  # tokens; of a longer document these are looked at


@dataclasses.dataclass(frozen=True)
class DocumentRun:
    """Successive documents, with BOS and EOS.

    tokens: of one after the other; lengths: of each in `tokens`, full_lengths: in the stream;
    starts: in tokens of the stream.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    full_lengths: np.ndarray
    starts: np.ndarray

    @property
    def offsets(self) -> np.ndarray:
        """Where each document starts in `tokens`."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def owners(self) -> np.ndarray:
        """The number of its document for each token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


@dataclasses.dataclass(frozen=True)
class DocumentReader:
    """The documents of one split of a prepared directory, as tokens and as text."""

    source: PreparedSplit
    tokenizer: Tokenizer

    def runs(self, max_tokens: int | None) -> Iterator[DocumentRun]:
        """Yield all documents, or those that start in evenly spaced parts of the stream.

        max_tokens: about so many are read; the last document of a part is read to its end.
        """
        num_groups = -(-self.source.num_blocks // _GROUP_BLOCKS)
        wanted = _evenly(num_groups, max_tokens)
        start, rest = None, np.empty(0, np.uint32)  # of a document that goes on
        for group in range(num_groups):
            if group not in wanted and start is None:
                continue
            base = group * _GROUP_BLOCKS * BLOCK_TOKENS
            tokens, starts = self.read(base, base + _GROUP_BLOCKS * BLOCK_TOKENS)
            borders = starts - base
            if group == num_groups - 1:
                borders = np.append(borders, len(tokens))
            if group not in wanted:  # of the next document no more than that it starts
                borders = borders[:1]
            head = tokens[: borders[0]] if len(borders) else tokens
            if start is not None:
                rest = np.concatenate((rest, head))[:MAX_DOCUMENT]
            if not len(borders):
                continue
            first, last = borders[0], borders[-1]
            found, starts, full = tokens[first:last], borders[:-1] + base, np.diff(borders)
            lengths = full
            if start is not None:
                found = np.concatenate((rest, found))
                starts = np.append(start, starts)
                full = np.append(base + first - start, full)
                lengths = np.append(len(rest), lengths)
            if len(starts):
                yield DocumentRun(found, lengths, full, starts)
            start, rest = (base + last, tokens[last:]) if group in wanted else (None, rest[:0])

    def read(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of the stream in [start, end), and where documents start there."""
        first, last = start // BLOCK_TOKENS, -(-end // BLOCK_TOKENS)
        blocks = self.source.blocks(range(first, min(last, self.source.num_blocks)))
        tokens = np.concatenate([block.tokens[:BLOCK_TOKENS] for block in blocks])
        starts = np.concatenate([
            block.starts[block.starts < BLOCK_TOKENS].astype(np.int64) + number * BLOCK_TOKENS
            for number, block in enumerate(blocks, first)
        ])  # fmt: skip
        base = first * BLOCK_TOKENS
        return tokens[start - base : end - base], starts[(starts >= start) & (starts < end)]

    def text(self, start: int, end: int, *, shown: int = _SHOWN_TOKENS) -> str:
        """Decode the first `shown` tokens of [start, end); ` ...` stands for the others."""
        tokens, _ = self.read(start, min(end, start + shown))
        text = self.tokenizer.decode(tokens.tolist())
        return text + " ..." * (end - start > shown)

    def document_at(self, token: int) -> tuple[int, int]:
        """Return start and end of the document that holds a token of the stream."""
        here = token // BLOCK_TOKENS

        def starts(number: int) -> np.ndarray:
            return self.read(number * BLOCK_TOKENS, (number + 1) * BLOCK_TOKENS)[1]

        before = (found[found <= token] for found in map(starts, range(here, -1, -1)))
        after = (found[found > token] for found in map(starts, range(here, self.source.num_blocks)))
        start = next(int(found[-1]) for found in before if len(found))
        return start, next((int(found[0]) for found in after if len(found)), self.source.num_tokens)


def _evenly(num_groups: int, max_tokens: int | None) -> set[int] | range:
    """Choose groups of blocks: all, or runs of successive ones at equal distances."""
    run = _RUN_GROUPS * _GROUP_BLOCKS * BLOCK_TOKENS
    if max_tokens is None or num_groups * run <= max_tokens * _RUN_GROUPS:
        return range(num_groups)
    count = max(1, max_tokens // run)
    firsts = (i * num_groups // count for i in range(count))
    return {first + i for first in firsts for i in range(_RUN_GROUPS)}
