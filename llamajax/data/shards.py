"""The format of prepared data on disk: blocks of one token stream in ArrayRecord files.

A split is one endless line of tokens, `BOS document EOS BOS document EOS ...`, cut into blocks of
BLOCK_TOKENS. A record is one block: two uint32 (number of tokens, number of document starts), the
offsets of the document starts (uint32), the tokens (uint16, or uint32 for a vocabulary over
65,536), all little endian. It also holds the first token of the next block, so that a sample of
T + 1 tokens with T = BLOCK_TOKENS is read from one record, not two. Records are not compressed:
tokens shrink by a third only, and reading would take half as long again.

Instruction data has one more bit for each token (the first is the highest of its byte): whether the
token carries loss as a target. A document is then an example in its chat template.
"""

import contextlib
import hashlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from llamajax.data.packing import Examples, loss_spans, packing_facts
from llamajax.errors import UserError

FORMAT_VERSION = 1
# With bits for the loss: a reader that does not know them must not train on the prompts.
MASKED_FORMAT_VERSION = 2
BLOCK_TOKENS = 4096
RECORDS_PER_SHARD = 32_768  # 134 M tokens, 268 MB as uint16
# Sequence lengths for which the manifest counts the longer examples: those are always cut.
_LENGTHS = (1024, 2048, 4096, 8192)
_HEADER = struct.Struct("<II")
_OFFSET = np.dtype("<u4")
_WRITER_OPTIONS = "group_size:1,uncompressed"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype of tokens on disk."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class TokenBlock(NamedTuple):
    """Tokens with the one after them, offsets of document starts, which tokens carry loss.

    answer: bool for each token; None for data that is no instructions.
    """

    tokens: np.ndarray
    starts: np.ndarray
    answer: np.ndarray | None

    def to_record(self) -> bytes:
        """Return the block's record."""
        head = _HEADER.pack(len(self.tokens), len(self.starts))
        record = head + self.starts.astype(_OFFSET).tobytes() + self.tokens.tobytes()
        return record if self.answer is None else record + np.packbits(self.answer).tobytes()


def unpack_block(record: bytes, dtype: np.dtype, *, masked: bool) -> TokenBlock:
    """Return the block of a record; tokens and starts are views of its memory."""
    num_tokens, num_starts = _HEADER.unpack_from(record)
    starts = np.frombuffer(record, _OFFSET, num_starts, _HEADER.size)
    tokens = np.frombuffer(record, dtype, num_tokens, _HEADER.size + starts.nbytes)
    if not masked:
        return TokenBlock(tokens, starts, None)
    bits = np.frombuffer(record, np.uint8, offset=len(record) - -(-num_tokens // 8))
    return TokenBlock(tokens, starts, np.unpackbits(bits, count=num_tokens).view(bool))


class _ShardFiles:
    """Writes the records of one split into numbered files of RECORDS_PER_SHARD."""

    def __init__(self, directory: Path, split: str) -> None:
        self._directory, self._split = directory, split
        self._file: Any = None
        self._num_records = 0

    def write(self, record: bytes) -> None:
        """Append a record. Raises UserError if the disk is full."""
        if self._num_records % RECORDS_PER_SHARD == 0:
            self.close()
            path = str(self._partial(self._num_records // RECORDS_PER_SHARD))
            self._file = array_record_module.ArrayRecordWriter(path, _WRITER_OPTIONS)
        with self._disk_errors():
            self._file.write(record)
        self._num_records += 1

    def close(self) -> None:
        """Close the current file. Raises UserError if the disk is full."""
        file, self._file = self._file, None
        if file is not None:
            with self._disk_errors():
                file.close()

    def finish(self, num_tokens: int) -> list[dict[str, Any]]:
        """Name the files and describe each; reads them once for their checksums."""
        self.close()
        shards = []
        total = -(-self._num_records // RECORDS_PER_SHARD)
        for number in range(total):
            name = f"{self._split}-{number:05d}-of-{total:05d}.array_record"
            path = self._partial(number).rename(self._directory / name)
            first = number * RECORDS_PER_SHARD
            records = min(RECORDS_PER_SHARD, self._num_records - first)
            with self._disk_errors():
                if _count_records(path) != records:
                    raise ValueError(f"{name} was cut short")
            tokens = min(records * BLOCK_TOKENS, num_tokens - first * BLOCK_TOKENS)
            size = path.stat().st_size
            shard = {"file": name, "bytes": size, "sha256": file_sha256(path)}
            shards.append(shard | {"records": records, "tokens": tokens})
        return shards

    def _partial(self, number: int) -> Path:
        return self._directory / f"{self._split}-{number:05d}.partial"

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"cannot write to {self._directory}: {error}. Is the disk full?"
            ) from error


class SplitWriter:
    """Writes one split. The bytes depend only on the tokens, not on how `add` was called.

    masked: every token comes with whether it carries loss. counts: how often each token is a target
    that carries loss.
    """

    def __init__(self, directory: Path, split: str, vocab_size: int, *, masked: bool) -> None:
        self._files, self._masked = _ShardFiles(directory, split), masked
        # Of the tokens that are not written yet:
        self._tokens = np.empty(0, token_dtype(vocab_size))
        self._answer = np.empty(0, bool)
        self._starts = np.empty(0, np.int64)
        self._examples: list[Examples] = []  # of each part that was added
        self.counts = np.zeros(vocab_size, np.int64)
        self.documents = self.tokens = self.text_bytes = 0

    def add(
        self,
        tokens: np.ndarray,
        lengths: Sequence[int],
        *,
        text_bytes: int,
        answer: np.ndarray | None = None,
        continues: bool = False,
    ) -> None:
        """Append documents, BOS and EOS included: their tokens in one array, and their lengths.

        answer: with `masked`, as bool, which tokens carry loss. continues: the first length is that
        of the rest, or a part, of the document before.
        """
        if not len(lengths):
            return
        starts = np.cumsum([0, *lengths[:-1]])[continues:]
        if not self._masked:  # the first token of a text is no target
            np.subtract.at(self.counts, tokens[starts], 1)
        self._starts = np.concatenate([self._starts, starts + len(self._tokens)])
        self._tokens = np.concatenate([self._tokens, tokens.astype(self._tokens.dtype, copy=False)])
        counted = tokens
        if self._masked:
            self._answer = np.concatenate([self._answer, answer])
            self._examples.append(Examples(np.array(lengths), loss_spans(answer, self.tokens)))
            counted = tokens[answer]
        self.counts += np.bincount(counted, minlength=len(self.counts))
        self.documents += len(starts)
        self.tokens += len(tokens)
        self.text_bytes += text_bytes
        # A block can be written when the token after it is known.
        self._write_blocks((len(self._tokens) - 1) // BLOCK_TOKENS)

    def _write_blocks(self, count: int) -> None:
        """Write the first blocks of the tokens that are left."""
        bounds = np.arange(count + 1) * BLOCK_TOKENS
        first = np.searchsorted(self._starts, bounds)
        end = np.searchsorted(self._starts, bounds, side="right")
        for block in range(count):
            begin = block * BLOCK_TOKENS
            part = slice(begin, begin + BLOCK_TOKENS + 1)
            starts = self._starts[first[block] : end[block + 1]] - begin
            answer = self._answer[part] if self._masked else None
            self._files.write(TokenBlock(self._tokens[part], starts, answer).to_record())
        done = count * BLOCK_TOKENS
        self._tokens, self._answer = self._tokens[done:].copy(), self._answer[done:].copy()
        self._starts = self._starts[first[-1] :] - done

    def abandon(self) -> None:
        """Close the file whatever its content; no-op after `close`."""
        with contextlib.suppress(UserError):  # a full disk may be the reason
            self._files.close()

    def close(self) -> dict[str, Any]:
        """Write what is left and return the split's part of the manifest."""
        self._write_blocks(-(-len(self._tokens) // BLOCK_TOKENS))
        shards = self._files.finish(self.tokens)
        facts = {"documents": self.documents, "tokens": self.tokens}
        if self._masked:
            parts = ((each.lengths, each.spans) for each in self._examples)
            examples = Examples(*map(np.concatenate, zip(*parts, strict=True)))
            facts |= {
                "loss_tokens": int(self.counts.sum()),
                "longest_document": int(examples.lengths.max()),
                "packing": {str(n): packing_facts(examples, n) for n in _LENGTHS},
            }
        return facts | {"text_bytes": self.text_bytes, "shards": shards}


def _count_records(path: Path) -> int:
    """Count the records of a file; raises RuntimeError or ValueError if it is damaged."""
    reader = array_record_module.ArrayRecordReader(str(path), options=READER_OPTIONS)
    count = reader.num_records()
    reader.close()
    return count


def file_sha256(path: Path) -> str:
    """Return the checksum of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
