"""Open one split of a prepared directory: what its manifest says, and its blocks of tokens."""

import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from llamajax.data.packing import WINDOWS, ExampleRows, Examples, Windows, loss_spans
from llamajax.data.shards import (
    BLOCK_TOKENS,
    FORMAT_VERSION,
    MASKED_FORMAT_VERSION,
    READER_OPTIONS,
    TokenBlock,
    file_sha256,
    token_dtype,
    unpack_block,
)
from llamajax.errors import UserError, combine
from llamajax.tokenizers.loading import MANIFEST

# Smaller than any record, so that reading one fetches its bytes and no more.
_READER_BUFFER_BYTES = 512


def read_manifest(path: Path, *, label: str = "data.path: ") -> dict[str, Any]:
    """Read the manifest of a prepared directory. UserError for none, or one of another format.

    label: what named the directory, for messages.
    """
    file = path / MANIFEST
    if not file.is_file():
        what = "no such directory"
        if path.is_dir():
            what = "not a prepared directory (no manifest.json)"
        raise UserError(
            f"{label}{path}: {what}; write one with `python -m llamajax.prepare "
            f"--input=FILES --tokenizer=TOK --output={path}`, or name another"
        )
    try:
        manifest = json.loads(file.read_text("utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged or not written by llamajax.prepare") from error
    known = (FORMAT_VERSION, MASKED_FORMAT_VERSION)
    if version not in known:
        raise UserError(
            f"{file}: format version {version}; this llamajax reads {known[0]} to {known[-1]}:"
            " prepare again"
        )
    return manifest


class _Shard:
    """A file of records, opened when it is first read, by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._reader: Any = None

    def records(self, numbers: Sequence[int]) -> list[bytes]:
        """Read records one by one.

        The library's `read` of a list hands each to a pool of threads, which costs four times as
        much as reading a record of this size from the page cache.
        """
        found = []
        try:
            with self._lock:
                if self._reader is None:
                    self._reader = array_record_module.ArrayRecordReader(
                        str(self._path),
                        options=READER_OPTIONS,
                        file_reader_buffer_size=_READER_BUFFER_BYTES,
                    )
                for number in numbers:
                    self._reader.seek(number)
                    found.append(self._reader.read())
            return found
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"{self._path}: damaged ({str(error)[:200]}); prepare this data again"
            ) from error


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedSplit:
    """One split of one prepared directory. Any number of threads may read its blocks."""

    path: Path
    manifest: dict[str, Any]
    split: str

    @property
    def stats(self) -> dict[str, Any]:
        """The split's part of the manifest."""
        return self.manifest["splits"][self.split]

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream, every BOS and EOS included."""
        return self.stats["tokens"]

    @property
    def num_blocks(self) -> int:
        """Blocks of the stream."""
        return int(self._ends[-1])

    @property
    def masked(self) -> bool:
        """Whether only some tokens carry loss: those of the answers, in instruction data."""
        return self.manifest.get("loss_mask", False)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that carry loss; without a mask all, the few that start a document included."""
        return self.stats["loss_tokens"] if self.masked else self.num_tokens

    @property
    def text_bytes(self) -> int | None:
        """UTF-8 bytes of the text; None where only answers are scored."""
        return None if self.masked else self.stats.get("text_bytes")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identity of the tokens, wherever the directory is."""
        return digest([self.manifest["tokenizer"]["fingerprint"], self.stats["shards"]])

    def tokenizer_problem(self, other: "PreparedSplit") -> str | None:
        """Return that another split has another tokenizer; None where it has the same."""
        ours, theirs = (s.manifest["tokenizer"]["fingerprint"] for s in (self, other))
        if ours == theirs:
            return None
        return (
            f"{self.path} was prepared with another tokenizer than {other.path} ({ours[:12]}, "
            f"{theirs[:12]}): prepare its text again with --tokenizer={other.path}"
        )

    @functools.cached_property
    def _shards(self) -> list[_Shard]:
        return [_Shard(self.path / shard["file"]) for shard in self.stats["shards"]]

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """Blocks up to the end of each shard."""
        return np.cumsum([shard["records"] for shard in self.stats["shards"]])

    def blocks(self, numbers: Sequence[int]) -> list[TokenBlock]:
        """Read the blocks with these numbers, in this order."""
        dtype = token_dtype(self.manifest["tokenizer"]["vocab_size"])
        shards = np.searchsorted(self._ends, numbers, side="right").tolist()
        found: dict[int, bytes] = {}
        for shard in set(shards):
            wanted = sorted({n for n, s in zip(numbers, shards, strict=True) if s == shard})
            base = int(self._ends[shard - 1]) if shard else 0
            records = self._shards[shard].records([n - base for n in wanted])
            found.update(zip(wanted, records, strict=True))
        return [unpack_block(found[n], dtype, masked=self.masked) for n in numbers]

    @functools.cached_property
    def examples(self) -> Examples:
        """The examples of instruction data.

        The first access reads all records, those of 100 M tokens in about a second.
        """
        starts, spans = [], []
        for number in range(self.num_blocks):
            (block,) = self.blocks([number])
            first = number * BLOCK_TOKENS
            starts.append(block.starts[block.starts < BLOCK_TOKENS].astype(np.int64) + first)
            spans.append(loss_spans(block.answer[:BLOCK_TOKENS], first))
        lengths = np.diff(np.concatenate(starts), append=self.num_tokens)
        return Examples(lengths, np.concatenate(spans))

    def samples(self, seq_len: int, packing: str, key: str | None = None) -> Windows | ExampleRows:
        """Return how the stream becomes samples. key: of `ExampleRows`; None: for evaluation."""
        if not self.masked or packing == WINDOWS:
            return Windows(self.num_tokens, seq_len)
        return ExampleRows(self.examples, seq_len, key)


def open_split(path: Path, split: str, *, verify: bool) -> PreparedSplit:
    """Open a split whose shards are complete. Raises UserError.

    verify: also read every shard once and compare its checksum.
    """
    manifest = read_manifest(path)
    stats = manifest["splits"].get(split)
    if not stats or not stats["tokens"]:
        raise UserError(
            f"{path}: no {split} split; it has {', '.join(manifest['splits'])}. Prepare it again"
            " with another --validation_fraction"
        )
    problems = []
    for shard in stats["shards"]:
        file = path / shard["file"]
        if not file.is_file():
            problems.append(f"{file.name} is missing")
        elif (size := file.stat().st_size) != shard["bytes"]:
            problems.append(f"{file.name} has {size} bytes, the manifest says {shard['bytes']}")
        elif verify and file_sha256(file) != shard["sha256"]:
            problems.append(f"{file.name}: its checksum is not the manifest's")
    if problems:
        raise combine(problems, title=f"{path}: damaged; copy it or prepare it again:")
    return PreparedSplit(path, manifest, split)


def digest(value: Any) -> str:
    """Return the hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
