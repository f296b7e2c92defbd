"""Read files of tokens that other tools wrote: they go into shards as they are, without text.

    .bin beside .idx   Megatron-LM's indexed dataset (megatron-core 0.16, `indexed_dataset.py`)
    .npy               tokens (N,), or rows of tokens (B, T), each of which begins a document
    .bin               llm.c's shards, by their magic number (`dev/data/data_common.py`), else
                       nanoGPT's: uint16, or uint32 for a vocabulary over 65,536

Megatron's index says where documents begin. Elsewhere one begins with the file or row, after each
EOS, and at each BOS. Nothing is added or left out.
"""

import dataclasses
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.corpus.documents import LeftOut
from llamajax.corpus.holdout import Holdout
from llamajax.corpus.input_files import TOKEN_FORMATS, format_of
from llamajax.corpus.input_patterns import InputFile
from llamajax.corpus.prepare_options import PrepareOptions
from llamajax.corpus.tokenizer_training import parse_train
from llamajax.corpus.tokenizing import TokenizedDocuments, by_split
from llamajax.data.shards import token_dtype
from llamajax.errors import UserError, combine, say
from llamajax.files import lfs_problem
from llamajax.tokenizers import Tokenizer

_CHUNK = 1 << 22  # tokens that are held at a time
_SAMPLE = 1 << 20  # tokens that show the width of one
_MEGATRON = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, document bounds
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LLMC = struct.Struct("<3i")  # magic, version, tokens; tokens begin at byte 1024
_LLMC_START = 1024
_LLMC_DTYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
_LLMC_MAGIC = (20240520, 20240522, 20240801)  # the second is of multiple choices


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """A file of tokens. starts: where documents begin, None: at its rows, EOS and BOS."""

    path: Path
    tokens: np.ndarray  # (N,), mapped from the disk
    starts: np.ndarray | None = None
    row: int = 0


def check_token_flags(options: PrepareOptions, files: Sequence[InputFile]) -> None:
    """Raise UserError for flags that are for text, if the input has files of tokens."""
    names = [f.path.name for f in files if format_of(f.path) in TOKEN_FORMATS]
    if not names:
        return
    useless = {
        "texts in the same --input (their own directory, and --config.data.path=data/a,data/b)":
            len(names) < len(files),
        "train:N (name the tokenizer that made the tokens)":
            parse_train(options.tokenizer) is not None,
        "--format=instructions": options.has_examples,
        "--text_key": any(f.options.text_key != "text" for f in files),
        "--clean": any(f.options.clean != "none" for f in files),
        "--document_separator": any(f.options.document_separator for f in files),
        "--on_error": options.on_error != "stop",
        "--num_tasks or --runner=beam (leave it out: tokens are only copied, by the merge)":
            options.num_tasks is not None or options.runner == "beam",
    }  # fmt: skip
    if wrong := [name for name, given in useless.items() if given]:
        raise UserError(
            f"--input: {names[0]} holds tokens, which are taken as they are; that does not go "
            f"with {', '.join(wrong)}"
        )


def open_tokens(path: Path, vocab_size: int) -> TokenFile:
    """Map a file of tokens. Raises UserError for one that is damaged or of an unknown kind."""
    try:
        with path.open("rb") as raw:
            head = raw.read(_LLMC_START)
        if not head:
            raise UserError(f"{path}: is empty")
        if problem := lfs_problem(head):
            raise UserError(f"{path}: {problem}")
        if path.suffix == ".npy":
            return _numpy(path)
        if path.with_suffix(".idx").is_file():
            return _megatron(path)
        if len(head) == _LLMC_START and _LLMC.unpack_from(head)[0] in _LLMC_MAGIC:
            return _llmc(path, head)
        tokens = _mapped(path, token_dtype(vocab_size).str, 0)
        if tokens.itemsize == 2 and len(tokens) > 1 and not tokens[1:_SAMPLE:2].any():
            raise UserError(
                f"{path}: read as uint16, every second token is 0: these are wider integers; save "
                f"them as .npy: numpy.save('{path.stem}.npy', numpy.fromfile('{path.name}', "
                "'uint32'))"
            )
        return TokenFile(path, tokens)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _mapped(path: Path, dtype: str, start: int) -> np.ndarray:
    size = path.stat().st_size - start
    if not size or size % np.dtype(dtype).itemsize:
        raise UserError(f"{path}: {size} bytes of tokens are no multiple of {np.dtype(dtype)}")
    return np.memmap(path, dtype, "r", start)


def _llmc(path: Path, head: bytes) -> TokenFile:
    magic, version, count = _LLMC.unpack_from(head)
    if (magic, version) not in _LLMC_DTYPES:
        raise UserError(
            f"{path}: magic {magic}, version {version}: not tokens that llm.c trains on"
        )
    tokens = _mapped(path, _LLMC_DTYPES[magic, version], _LLMC_START)
    if len(tokens) != count:
        raise UserError(f"{path}: has {len(tokens)} tokens, its header says {count}: cut short?")
    return TokenFile(path, tokens)


def _numpy(path: Path) -> TokenFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged, or no array of numbers ({error})") from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or not array.flags.c_contiguous:
        raise UserError(
            f"{path}: {array.dtype} of shape {array.shape}; tokens are whole numbers (N,) or (B, T)"
            " in C order"
        )
    return TokenFile(path, array.reshape(-1), row=array.shape[1] if array.ndim == 2 else 0)


def _megatron(path: Path) -> TokenFile:
    index = path.with_suffix(".idx")
    size = index.stat().st_size
    with index.open("rb") as raw:
        head = raw.read(_MEGATRON.size)
    if len(head) < _MEGATRON.size or not head.startswith(_MEGATRON_MAGIC):
        raise UserError(f"{index}: not an index of Megatron-LM (MMIDIDX)")
    _, version, code, sequences, bounds = _MEGATRON.unpack(head)
    if version != 1 or code not in _MEGATRON_DTYPES or not sequences or not bounds:
        raise UserError(
            f"{index}: version {version}, dtype {code}, {sequences} sequences: no tokens that can "
            "be read"
        )
    ends = _MEGATRON.size + np.cumsum([0, 4 * sequences, 8 * sequences, 8 * bounds])
    if size not in (ends[3], ends[3] + sequences):  # with the modes of several media
        raise UserError(f"{index}: has {size} bytes instead of {ends[3]}: cut short?")
    lengths, pointers, documents = (
        np.memmap(index, dtype, "r", int(at), count)
        for dtype, at, count in zip(
            ("<i4", "<i8", "<i8"), ends, (sequences, sequences, bounds), strict=False
        )
    )
    tokens = _mapped(path, _MEGATRON_DTYPES[code], 0)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    if offsets[-1] != len(tokens) or not np.array_equal(offsets[:-1] * tokens.itemsize, pointers):
        raise UserError(f"{path}: {len(tokens)} tokens, not in the places that {index} names")
    if documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise UserError(f"{index}: its documents do not hold all sequences")
    return TokenFile(path, tokens, np.unique(offsets[documents[:-1]]))


class TokenCorpus:
    """The tokens of some files as documents: what `Corpus` is for texts."""

    def __init__(self, files: Sequence[InputFile], tokenizer: Tokenizer) -> None:
        self._files, self._tokenizer = files, tokenizer
        self._opened, problems = [], []
        for file in files:
            try:
                self._opened.append(open_tokens(file.path, tokenizer.vocab_size))
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise combine(problems, title="these files of tokens cannot be used:")
        self.total_bytes = sum(file.tokens.nbytes for file in self._opened)
        self.bytes_read = self.num_articles = 0
        self.left_out = LeftOut()
        self.declared: list[tuple[str, int]] = []
        self.report: Callable[[], None] = lambda: None

    def check(self) -> Iterator[int]:
        """Read all tokens and yield how many each document has.

        Raises UserError for one that the tokenizer lacks. Warns if no document ends with EOS.
        """
        eos, bos = self._tokenizer.eos_id, self._tokenizer.bos_id
        counts = dict.fromkeys(range(len(self._files)), 0)
        ends = begins = length = 0
        last = -1
        for number, tokens, starts in self._chunks():
            counts[number] += len(starts)
            begins += int((tokens[starts] == bos).sum())
            ends += int((np.append(last, tokens)[starts] == eos).sum())
            last = tokens[-1]
            if len(starts):
                yield from [length + int(starts[0])] * bool(length + starts[0])
                yield from np.diff(starts).tolist()
                length = -int(starts[-1])
            length += len(tokens)
        ends += bool(last == eos)
        if length:
            yield length
        splits = (file.split or "train" for file in self._files)
        self.declared[:] = zip(splits, counts.values(), strict=True)
        total = sum(counts.values())
        self.left_out = LeftOut(without_bos=total - begins, without_eos=total - ends)
        if total and not ends:
            say(
                f"warning: no document ends with EOS ({eos}), so a model will not learn to end; "
                "and without an index each file is one document. Is this the tokens' tokenizer?"
            )

    def split(self, holdout: Holdout) -> Iterator[TokenizedDocuments]:
        """Yield all tokens, divided into splits; a document that is cut is cut at any token."""
        sizes = self._tokenizer.token_bytes(range(self._tokenizer.vocab_size))
        first = self._tokenizer.encode("a")
        prefix = sizes[first].sum() - 1  # a space that SentencePiece puts before texts
        held, goes_on, seen, done, cut_at = holdout.held(), np.zeros(0, bool), 0, 0, -1
        for _, tokens, starts in self._chunks():
            flags = np.fromiter(held, bool, len(starts))
            if holdout.cut is not None and seen <= holdout.cut < seen + len(starts):
                cut_at = done + int(starts[holdout.cut - seen]) + holdout.cut_at
            seen += len(starts)
            if done <= cut_at < done + len(tokens):
                place = int(np.searchsorted(starts, cut_at - done))
                starts, flags = np.insert(starts, place, cut_at - done), np.insert(flags, place, 1)
            done += len(tokens)
            continues = not len(starts) or bool(starts[0] > 0)
            if continues:
                starts, flags = np.insert(starts, 0, 0), np.insert(flags, 0, goes_on[-1])
            lengths = np.diff(starts, append=len(tokens))
            text_bytes = np.add.reduceat(sizes[tokens], starts)
            text_bytes[continues:] = np.maximum(0, text_bytes[continues:] - prefix)
            yield from by_split(flags, tokens, None, lengths, text_bytes, continues=continues)
            goes_on = flags

    def _chunks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield the number of the file, tokens, and where documents begin among them."""
        self.bytes_read, size = 0, self._tokenizer.vocab_size
        for number, file in enumerate(self._opened):
            last = None
            for first in range(0, len(file.tokens), _CHUNK):
                tokens = np.asarray(file.tokens[first : first + _CHUNK])
                for bad in (tokens.max(), tokens.min()):
                    if not 0 <= bad < size:
                        at = first + int((tokens == bad).argmax())
                        raise UserError(
                            f"{file.path}: token {bad} at {at} (read as {tokens.dtype}) is outside "
                            f"the tokenizer's 0..{size - 1}: name the tokenizer that made it"
                        )
                yield (
                    number,
                    tokens.astype(token_dtype(size)),
                    self._starts(file, tokens, first, last),
                )
                last = tokens[-1]
                self.bytes_read += tokens.nbytes
                self.report()

    def _starts(self, file: TokenFile, tokens: np.ndarray, first: int, last: Any) -> np.ndarray:
        """Return where documents begin in a chunk; last: the token before it."""
        if file.starts is not None:
            low, high = np.searchsorted(file.starts, (first, first + len(tokens)))
            return file.starts[low:high] - first
        eos, bos = self._tokenizer.eos_id, self._tokenizer.bos_id
        begins = np.concatenate(([last is None or last == eos], tokens[:-1] == eos))
        if bos not in (None, eos):
            begins |= tokens == bos
        if file.row:
            begins[-first % file.row :: file.row] = True
        return np.flatnonzero(begins)
