"""The format of prepared data on disk: blocks of one token stream in ArrayRecord files.

A split is one endless line of tokens, `BOS document EOS BOS document EOS ...`, cut into blocks of
BLOCK_TOKENS. A record is one block: two uint32 (number of tokens, number of document starts), the
offsets of the document starts (uint32), the tokens (uint16, or uint32 for a vocabulary over
65,536), all little endian. It also holds the first token of the next block, so that a sample of
T + 1 tokens with T = BLOCK_TOKENS is read from one record, not two. Records are not compressed:
tokens shrink by a third only, and reading would take half as long again.

In instruction data the record goes on with a bit a token (the first is the highest of its byte):
whether the token carries loss as a target. A document is then an example in its chat template.
"""

import contextlib
import hashlib
import math
import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from llamajax.errors import UserError

FORMAT_VERSION = 1
# With bits for the loss: one who does not know them must not train on the prompts.
MASKED_FORMAT_VERSION = 2
BLOCK_TOKENS = 4096
# Sequence lengths for which the longer examples, those that are always cut, are counted.
_LENGTHS = (1024, 2048, 4096, 8192)
RECORDS_PER_SHARD = 32_768  # 134 M tokens, 268 MB as uint16
_HEADER = struct.Struct("<II")
_OFFSET = np.dtype("<u4")
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
# Smaller than any record, so that a read of one fetches its bytes and no more.
_READER_BUFFER_BYTES = 512


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of tokens on disk."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def pack_block(tokens: np.ndarray, starts: np.ndarray, answer: np.ndarray | None) -> bytes:
    """The record of a block: its tokens (with the one after it), where documents start, and
    perhaps which tokens carry loss."""
    head = _HEADER.pack(len(tokens), len(starts))
    record = head + starts.astype(_OFFSET).tobytes() + tokens.tobytes()
    return record if answer is None else record + np.packbits(answer).tobytes()


def unpack_block(record: bytes, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and document starts of a record; views of its memory."""
    num_tokens, num_starts = _HEADER.unpack_from(record)
    starts = np.frombuffer(record, _OFFSET, num_starts, _HEADER.size)
    return np.frombuffer(record, dtype, num_tokens, _HEADER.size + 4 * num_starts), starts


def unpack_answer(record: bytes, num_tokens: int) -> np.ndarray:
    """Which tokens of a record with bits for the loss carry it; (num_tokens,) bool."""
    size = -(-num_tokens // 8)
    bits = np.frombuffer(record, np.uint8, size, len(record) - size)
    return np.unpackbits(bits, count=num_tokens).view(bool)


class SplitWriter:
    """Writes one split; `close` returns its part of the manifest.

    The bytes written depend only on the tokens, not on how `add` was called. `masked`: every token
    comes with whether it carries loss, and `counts` count only those that do.
    """

    def __init__(self, directory: Path, split: str, vocab_size: int, *, masked: bool) -> None:
        self._directory, self._split, self._masked = directory, split, masked
        self._dtype = token_dtype(vocab_size)
        self._pending: list[np.ndarray] = []
        self._answers: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._starts: list[np.ndarray] = []
        self._pending_tokens = 0
        self._writer: Any = None
        self._records = self._shards = 0
        self.counts = np.zeros(vocab_size, np.int64)
        self.documents = self.tokens = self.text_bytes = 0

    def add(
        self,
        tokens: np.ndarray,
        lengths: Sequence[int],
        *,
        text_bytes: int,
        answer: np.ndarray | None = None,
    ) -> None:
        """Append documents, BOS and EOS included: their tokens in one array, and their lengths;
        with `masked` also, as bool, which tokens carry loss."""
        if not len(lengths):
            return
        starts = np.cumsum([0, *lengths[:-1]])
        self._starts.append(starts + self._pending_tokens)
        self._pending.append(tokens.astype(self._dtype, copy=False))
        self._pending_tokens += len(tokens)
        if self._masked:
            self._answers.append(answer)
            self._lengths += lengths
        counted = tokens[answer] if self._masked else tokens
        self.counts += np.bincount(counted, minlength=len(self.counts))
        self.documents += len(lengths)
        self.tokens += len(tokens)
        self.text_bytes += text_bytes
        if self._pending_tokens > 64 * BLOCK_TOKENS:
            self._flush(last=False)

    def _flush(self, *, last: bool) -> None:
        stream = np.concatenate(self._pending or [np.empty(0, self._dtype)])
        answer = np.concatenate(self._answers or [np.empty(0, bool)])
        starts = np.concatenate(self._starts or [np.empty(0, np.int64)])
        # A block is written when the token after it is known.
        blocks = -(-len(stream) // BLOCK_TOKENS) if last else (len(stream) - 1) // BLOCK_TOKENS
        first = np.searchsorted(starts, np.arange(blocks) * BLOCK_TOKENS)
        end = np.searchsorted(starts, (np.arange(blocks) + 1) * BLOCK_TOKENS, side="right")
        for block in range(blocks):
            begin = block * BLOCK_TOKENS
            part = slice(begin, begin + BLOCK_TOKENS + 1)
            offsets = starts[first[block] : end[block]] - begin
            self._write(pack_block(stream[part], offsets, answer[part] if self._masked else None))
        done = blocks * BLOCK_TOKENS
        self._pending = [stream[done:].copy()]
        self._answers = [answer[done:].copy()]
        self._starts = [starts[starts >= done] - done]
        self._pending_tokens = len(self._pending[0])

    def _shard(self, number: int) -> Path:
        return self._directory / f"{self._split}-{number:05d}.partial"

    def _write(self, record: bytes) -> None:
        if self._records % RECORDS_PER_SHARD == 0:
            self._close_shard()
            path = str(self._shard(self._shards))
            self._writer = array_record_module.ArrayRecordWriter(path, _WRITER_OPTIONS)
            self._shards += 1
        try:
            self._writer.write(record)
        except (RuntimeError, ValueError) as error:
            raise _unwritable(self._directory, error) from error
        self._records += 1

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        try:
            writer.close()
        except (RuntimeError, ValueError) as error:
            raise _unwritable(self._directory, error) from error

    def abandon(self) -> None:
        """Close the file without caring for its content."""
        writer, self._writer = self._writer, None
        if writer is not None:
            # A full disk may be why we are here.
            with contextlib.suppress(RuntimeError, ValueError):
                writer.close()

    def close(self) -> dict[str, Any]:
        """Write what is left, name the shards, read them back once for their checksums."""
        self._flush(last=True)
        self._close_shard()
        shards = []
        for number in range(self._shards):
            name = f"{self._split}-{number:05d}-of-{self._shards:05d}.array_record"
            path = self._shard(number).rename(self._directory / name)
            records = min(RECORDS_PER_SHARD, self._records - number * RECORDS_PER_SHARD)
            if count_records(path) != records:
                raise _unwritable(self._directory, f"{name} was cut short")
            first = number * RECORDS_PER_SHARD * BLOCK_TOKENS
            tokens = min(records * BLOCK_TOKENS, self.tokens - first)
            size = path.stat().st_size
            shard = {"file": name, "bytes": size, "sha256": file_sha256(path)}
            shards.append(shard | {"records": records, "tokens": tokens})
        counts = {"documents": self.documents, "tokens": self.tokens}
        if self._masked:
            counts |= {
                "loss_tokens": int(self.counts.sum()),
                "longest_document": max(self._lengths),
                "documents_over": {str(n): sum(x > n for x in self._lengths) for n in _LENGTHS},
            }
        return counts | {"text_bytes": self.text_bytes, "shards": shards}


def _unwritable(directory: Path, error: Exception | str) -> UserError:
    return UserError(f"cannot write to {directory}: {error}. Is the disk full?")


def count_records(path: Path) -> int:
    """Number of records that a file says it holds; 0 if it is no whole ArrayRecord file."""
    try:
        reader = array_record_module.ArrayRecordReader(str(path), options=_READER_OPTIONS)
        count = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError):
        return 0
    return count


def file_sha256(path: Path) -> str:
    """Checksum of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution of tokens that `counts` describes."""
    p = counts[counts > 0] / max(1, counts.sum())
    return float(-(p * np.log(p)).sum())


def unigram_loss(counts: np.ndarray, train_counts: np.ndarray) -> float:
    """Mean -log p, in nats, of the counted tokens; p: add-one smoothed share in `train_counts`."""
    log_p = np.log(train_counts + 1) - math.log(train_counts.sum() + len(train_counts))
    return float(-(counts * log_p).sum() / max(1, counts.sum()))


class SplitReader:
    """Random access to the blocks of one split, from any number of threads."""

    def __init__(
        self,
        directory: Path,
        shards: Sequence[dict[str, Any]],
        dtype: np.dtype,
        *,
        masked: bool = False,
    ) -> None:
        self._paths = [directory / s["file"] for s in shards]
        self._ends = np.cumsum([s["records"] for s in shards])
        self._readers: list[Any] = [None] * len(shards)
        self._locks = [threading.Lock() for _ in shards]
        self._dtype = dtype
        self._masked = masked

    def _reader(self, shard: int) -> Any:
        if self._readers[shard] is None:
            self._readers[shard] = array_record_module.ArrayRecordReader(
                os.fspath(self._paths[shard]),
                options=_READER_OPTIONS,
                file_reader_buffer_size=_READER_BUFFER_BYTES,
            )
        return self._readers[shard]

    def blocks(
        self, numbers: Sequence[int]
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """Tokens, document starts and, in instruction data, which tokens carry loss, of the blocks
        with these numbers, in this order."""
        shards = np.searchsorted(self._ends, numbers, side="right").tolist()
        found: dict[int, bytes] = {}
        for shard in set(shards):
            wanted = [n for n, s in zip(numbers, shards, strict=True) if s == shard]
            found.update(zip(wanted, self._records(shard, wanted), strict=True))
        blocks = []
        for number in numbers:
            tokens, starts = unpack_block(found[number], self._dtype)
            answer = unpack_answer(found[number], len(tokens)) if self._masked else None
            blocks.append((tokens, starts, answer))
        return blocks

    def _records(self, shard: int, numbers: list[int]) -> list[bytes]:
        """Records one by one: `read` of a list hands each to a pool of threads, which costs four
        times as much as reading a record of this size from the page cache."""
        base = int(self._ends[shard - 1]) if shard else 0
        records = []
        try:
            with self._locks[shard]:
                reader = self._reader(shard)
                for number in numbers:
                    reader.seek(number - base)
                    records.append(reader.read())
            return records
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"{self._paths[shard]}: damaged ({str(error)[:200]}); prepare this data again"
            ) from error
