"""Read documents from files: text, JSON, Parquet, Arrow, WikiText; plain, gzip or zstd."""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamajax.corpus.long_text import CHUNK
from llamajax.errors import UserError
from llamajax.files import lfs_problem

TOKEN_FORMATS = (".bin", ".npy")
FORMATS = (".txt", ".jsonl", ".parquet", ".arrow", ".tokens", ".raw", *TOKEN_FORMATS)
COMPRESSIONS = (".gz", ".zst")
_BOM = "\ufeff"
_COMPRESSED_STEP = 1 << 16  # bytes; what was read before damage is kept, but for the last step
# How bytes that are no UTF-8 are decoded, and nothing else is.
_BAD = "surrogateescape"
_BAD_BYTES = re.compile("([\udc80-\udcff]+)")
# Every line of JSON has one.
_VISIBLE = re.compile(rb"[!-~]")


def format_of(path: Path) -> str | None:
    """Return the extension that says how to read a file, without compression; None if unknown.

    `.json` and `.ndjson` are JSON lines: C4 and Dolma name them so (`.json.gz`).
    """
    name = path.name.lower()
    if name.endswith(TOKEN_FORMATS):
        return name[-4:]
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    if name.endswith((".json", ".ndjson")):
        return ".jsonl"
    texts = (f for f in FORMATS if f not in TOKEN_FORMATS)
    return next((f for f in texts if name.endswith(f)), None)


def read_text(file: Path) -> str:
    """Read a whole text file, decompressed if its name says so, without a byte order mark.

    Raises UserError if it cannot be read, is damaged or is not UTF-8.
    """
    try:
        with file.open("rb") as raw:
            data = decompressed(file, raw).read()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
    return decode(file, data, 0).removeprefix(_BOM)


def read_numbered_lines(file: Path) -> list[tuple[int, str]]:
    """Read the lines of a text file that are more than white space, each with its number.

    Raises UserError as `read_text` does.
    """
    try:
        with file.open("rb") as raw:
            return list(numbered_lines(file, decompressed(file, raw)))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error


class _Decompressed(io.RawIOBase):
    """A decompressed stream that raises UserError for a damaged file, and for UTF-16."""

    def __init__(self, file: Path, stream: Any) -> None:
        self._file, self._begins = file, True
        # GzipFile.read loses at damage all that it had decoded in that call.
        self._read = stream.read1 if isinstance(stream, gzip.GzipFile) else stream.read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._read(min(len(buffer), _COMPRESSED_STEP))
        except (EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's error; those of gzip and of Arrow's zstd have no number
            if "too much memory" in str(error):
                name = self._file.name
                raise UserError(
                    f"{self._file}: was written by zstd --long with a larger window than is read "
                    f"here (128 MB); write it again: zstd -d --long=31 {name} && zstd "
                    f"{name.removesuffix('.zst')}"
                ) from error
            raise UserError(f"{self._file}: truncated or damaged: {error}") from error
        if self._begins and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            name = self._file.name
            raise UserError(
                f"{self._file}: is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {name} > utf8.txt"
            )
        self._begins = False
        buffer[: len(data)] = data
        return len(data)


def decompressed(file: Path, raw: io.BufferedReader) -> io.BufferedReader:
    """Return the decompressed content of an open file. Reading it raises UserError for damage."""
    name, stream = file.name.lower(), raw
    if problem := lfs_problem(raw.peek(100)):
        raise UserError(f"{file}: {problem}")
    if name.endswith(".gz"):
        stream = gzip.GzipFile(fileobj=raw)
    elif name.endswith(".zst"):
        import pyarrow as pa

        stream = pa.CompressedInputStream(raw, "zstd")
    return io.BufferedReader(_Decompressed(file, stream), CHUNK)


def decode(place: Path | str, data: bytes, offset: int) -> str:
    """Decode UTF-8 at an offset of a decompressed file. Raises UserError that names the place."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(place, data[error.start], offset + error.start) from error


def _not_utf8(place: Path | str, byte: int, offset: int) -> UserError:
    return UserError(
        f"{place}: not UTF-8: byte 0x{byte:02x} at offset {offset} (of the decompressed text); "
        "convert the file to UTF-8"
    )


def decoded_chunks(file: Path, stream: io.BufferedReader) -> Iterator[str | UserError]:
    """Yield a text in chunks of a bounded size, without a byte order mark.

    A UserError stands for each run of bytes that are no UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(_BAD)
    data, offset = b"-", 0
    while data:
        data = stream.read1(CHUNK)
        text = decoder.decode(data, final=not data)
        try:
            parts = [(text, len(text.encode()))]
        except UnicodeEncodeError:
            parts = [(p, len(p.encode("utf-8", _BAD))) for p in _BAD_BYTES.split(text)]
        for part, size in parts:
            if _BAD_BYTES.match(part):
                yield _not_utf8(file, part[0].encode("utf-8", _BAD)[0], offset)
            else:
                yield part if offset else part.removeprefix(_BOM)
            offset += size


def byte_lines(stream: io.BufferedReader) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, offset and content of all lines, without a byte order mark.

    Only a newline ends a line.
    """
    offset = 0
    for number, line in enumerate(stream, 1):
        end = offset + len(line)
        line = line if offset else line.removeprefix(codecs.BOM_UTF8)
        yield number, end - len(line), line
        offset = end


def is_blank(line: bytes) -> bool:
    """Return whether a line is nothing but white space."""
    return not _VISIBLE.search(line) and not line.decode("utf-8", "replace").strip()


def lines_of(file: Path, stream: io.BufferedReader) -> Iterator[str | UserError]:
    """Yield all lines with their ends; a UserError for one that is not UTF-8."""
    for _, offset, line in byte_lines(stream):
        try:
            yield decode(file, line, offset)
        except UserError as error:
            yield error


def numbered_lines(file: Path, stream: io.BufferedReader) -> Iterator[tuple[int, str]]:
    """Yield the lines that are more than white space, each with its number in the file."""
    for number, offset, line in byte_lines(stream):
        if not is_blank(line):
            yield number, decode(file, line, offset)


def json_object(line: str) -> dict[str, Any]:
    """Parse a line that holds a JSON object. Raises UserError without the place."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}") from error
    return checked_object(value)


def checked_object(value: Any) -> dict[str, Any]:
    """Return a value of JSON. Raises UserError unless it is an object."""
    if not isinstance(value, dict):
        raise UserError(f"of type {type(value).__name__}, not a JSON object")
    return value
