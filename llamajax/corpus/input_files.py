"""Documents out of files: text, JSON lines, Parquet, WikiText; plain, gzip or zstd.

Which documents are held out is decided in `holdout.py`; the markup of WikiText is in `wikitext.py`.
"""

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from llamajax.corpus import wikitext
from llamajax.errors import UserError, say
from llamajax.files import lfs_problem

FORMATS = (".txt", ".jsonl", ".parquet", ".tokens", ".raw")
_WIKITEXT = (".tokens", ".raw")
COMPRESSIONS = (".gz", ".zst")
_BOM = "\ufeff"


def find_files(patterns: str) -> list[Path]:
    """Files that comma-separated paths, directories and globs name, sorted within each, once each.

    A directory means all files of a known kind in it, at any depth. Raises UserError for a pattern
    without files and for a file of an unknown kind.
    """
    found: dict[Path, Path] = {}
    for pattern in (p.strip() for p in patterns.split(",") if p.strip()):
        path = Path(pattern)
        if path.is_dir():
            files, others = _files_in(path)
            _note_left_out(pattern, others)
            if not files:
                raise UserError(f"--input: no {', '.join(FORMATS)} files in directory {pattern}")
        elif path.exists():
            files = [path]
        else:
            matched = sorted(Path(f) for f in glob.glob(pattern, recursive=True))
            files = [f for f in matched if f.is_file()]
            known = {*files, *(folder for f in files for folder in f.parents)}
            _note_left_out(pattern, [str(f) for f in matched if f not in known])
            if not files:
                kind = "no file matches" if glob.has_magic(pattern) else "no such file:"
                raise UserError(f"--input: {kind} {pattern}")
        for file in files:
            if not format_of(file):
                raise UserError(
                    f"--input: {file}: unknown kind of file; known are {', '.join(FORMATS)},"
                    f" each also with {' or '.join(COMPRESSIONS)}"
                )
            found.setdefault(file.resolve(), file)
    if not found:
        raise UserError("--input is empty; name a file, a directory or a glob")
    return list(found.values())


def _note_left_out(pattern: str, names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        is_json = any(name.lower().endswith(".json") for name in names)
        say(
            f"note: --input: {len(names)} left out of {pattern}, not of a kind that is read from "
            f"there: {shown}"
            + ("; name a .json file itself if it holds JSON lines" if is_json else "")
        )


def _files_in(directory: Path) -> tuple[list[Path], list[str]]:
    """The files to read in a directory at any depth, sorted, and the names of the others.

    Symbolic links are followed. Hidden files are ignored. A plain `.json` is most often no data.
    Raises UserError for a folder that cannot be listed.
    """
    files, others, seen = [], [], set()

    def refuse(error: OSError) -> None:
        raise UserError(f"--input: {error.filename}: cannot be listed: {error.strerror}") from error

    for folder, folders, names in os.walk(directory, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        visible = [] if real in seen else [Path(folder, n) for n in names if not n.startswith(".")]
        seen.add(real)
        for file in visible:
            if file.is_file() and format_of(file) and file.suffix.lower() != ".json":
                files.append(file)
            else:
                others.append(str(file.relative_to(directory)))
    return sorted(files), sorted(others)


def format_of(path: Path) -> str | None:
    """The extension that says how a file is read, compression apart; None if it is unknown.

    `.json` and `.ndjson` hold JSON lines; C4 and Dolma name them so (`.json.gz`).
    """
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    if name.endswith((".json", ".ndjson")):
        return ".jsonl"
    return next((f for f in FORMATS if name.endswith(f)), None)


def read_text(file: Path) -> str:
    """All of a text file, gunzipped or unpacked where its name ends so, without a byte order mark.

    Raises UserError when it cannot be read, is damaged or is not UTF-8.
    """
    try:
        with file.open("rb") as raw:
            data = _Checked(file, _decompressed(file, raw)).read()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
    return _decode(file, data, 0).removeprefix(_BOM)


class Corpus:
    """The documents of some files, in order; can be walked any number of times.

    `bytes_read` and `total_bytes` count the files as they lie on disk, for a progress bar.
    """

    def __init__(self, files: Sequence[Path], *, text_key: str, clean: str) -> None:
        self._files, self._text_key, self._clean = files, text_key, clean
        self.total_bytes = sum(f.stat().st_size for f in files)
        self._done_bytes = self._articles = 0
        self._stream: BinaryIO | None = None

    @property
    def compressed_share(self) -> float:
        """Share of the bytes that lie in compressed files (Parquet counts as such)."""
        compressed = (*COMPRESSIONS, ".parquet")
        sizes = (f.stat().st_size for f in self._files if f.name.lower().endswith(compressed))
        return sum(sizes) / max(1, self.total_bytes)

    @property
    def bytes_read(self) -> int:
        """Bytes of the files that the walk under way has passed."""
        stream = self._stream
        return self._done_bytes + (stream.tell() if stream and not stream.closed else 0)

    @property
    def warnings(self) -> list[str]:
        """What the last whole walk found to be strange."""
        return article_warnings(self._clean, self._articles)

    def __iter__(self) -> Iterator[str]:
        """Texts that are more than white space. Raises UserError naming file and line."""
        self._done_bytes = self._articles = 0
        for file in self._files:
            try:
                with file.open("rb") as self._stream:
                    yield from self._documents(file, self._stream)
            except OSError as error:
                raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
            self._done_bytes += file.stat().st_size

    def _documents(self, file: Path, raw: BinaryIO) -> Iterator[str]:
        """What one open file holds; other corpora override this."""
        for text in self._texts(file, raw):
            if text and not text.isspace():
                yield text

    def _texts(self, file: Path, raw: BinaryIO) -> Iterator[str]:
        form = format_of(file)
        stream = decompressed(file, raw)
        if form == ".parquet":
            rows = _parquet(file, raw, stream, self._text_key)
        elif form == ".jsonl":
            rows = _json_lines(file, stream, self._text_key)
        elif form == ".txt" and self._clean == "none":
            yield _decode(file, stream.read(), 0).removeprefix(_BOM)
            return
        else:
            rows = _lines(file, stream)
        if form in _WIKITEXT or self._clean == "wikitext":
            lines = wikitext.lines_of(rows) if form in (".parquet", ".jsonl") else rows
            for article in wikitext.articles(lines):
                self._articles += not article.isspace()
                yield wikitext.clean(article) if self._clean == "wikitext" else article
        else:
            yield from rows


def article_warnings(clean: str, num_articles: int) -> list[str]:
    """Return what is strange about that many articles in all files."""
    if clean != "wikitext" or num_articles != 1:
        return []
    return [
        "--clean=wikitext found a single article in all files: no line ` = Title = ` follows a "
        "blank line; is this WikiText?"
    ]


class _Checked(io.RawIOBase):
    """A decompressed stream whose failures are the user's damaged file."""

    def __init__(self, file: Path, stream: Any) -> None:
        self._file, self._inner = file, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._guarded(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        return (
            self._guarded(size)
            if size >= 0
            else b"".join(iter(lambda: self._guarded(1 << 20), b""))
        )

    def _guarded(self, size: int) -> bytes:
        try:
            return self._inner.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error, _BadZstdError) as error:
            raise UserError(f"{self._file}: truncated or damaged: {error}") from error


class _BadZstdError(Exception):
    pass


class _Zstd:
    """Reads zstd frames one after the other; unlike zstandard's reader, notices a missing end."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._library = raw, zstandard
        self._frame: Any = None
        self._input = b""
        self._output = b""

    def read(self, size: int) -> bytes:
        while not self._output:
            if not self._input:
                self._input = self._raw.read(1 << 17)
            if not self._input:
                if self._frame is not None:
                    raise _BadZstdError("the file ends inside a zstd frame")
                return b""
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._output = self._frame.decompress(self._input)
            except self._library.ZstdError as error:
                raise _BadZstdError(str(error)) from error
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        data, self._output = self._output[:size], self._output[size:]
        return data


def _decompressed(file: Path, raw: io.BufferedReader) -> Any:
    name = file.name.lower()
    if problem := lfs_problem(raw.peek(100)):
        raise UserError(f"{file}: {problem}")
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    return _Zstd(raw) if name.endswith(".zst") else raw


def decompressed(file: Path, raw: BinaryIO) -> io.RawIOBase:
    """The decompressed content of an open file, whose damage is a UserError."""
    return _Checked(file, _decompressed(file, raw))


def _decode(file: Path, data: bytes, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if not offset and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(
                f"{file}: is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {file.name} > utf8.txt"
            ) from error
        raise UserError(
            f"{file}: not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start}"
            " (of the decompressed text); convert the file to UTF-8"
        ) from error


def _lines(file: Path, stream: io.RawIOBase) -> Iterator[str]:
    """Lines with their ends; only a newline ends one."""
    offset = 0
    for line in io.BufferedReader(stream, 1 << 20):
        text = _decode(file, line, offset)
        yield text.removeprefix(_BOM) if offset == 0 else text
        offset += len(line)


def numbered_lines(file: Path, stream: io.RawIOBase) -> Iterator[tuple[int, str]]:
    """Lines that are more than white space, with their number in the file."""
    for number, line in enumerate(_lines(file, stream), 1):
        if not line.isspace():
            yield number, line


def json_object(line: str) -> dict[str, Any]:
    """The object that a line of JSON holds. Raises UserError, which does not know the place."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"a {type(value).__name__}, not a JSON object")
    return value


def _json_lines(file: Path, stream: io.RawIOBase, text_key: str) -> Iterator[str]:
    for number, line in numbered_lines(file, stream):
        try:
            text = _text_of(json_object(line), text_key)
        except UserError as error:
            raise UserError(f"{file}:{number}: {error}") from error
        yield text


def _text_of(value: dict[str, Any], text_key: str) -> str:
    if text_key not in value:
        raise UserError(
            f"no key {text_key!r} in this object (it has"
            f" {', '.join(map(repr, value)) or 'none'}); name the right one with --text_key"
        )
    if not isinstance(value[text_key], str):
        raise UserError(f"{text_key!r} is a {type(value[text_key]).__name__}, not a string")
    return value[text_key]


def _parquet(file: Path, raw: BinaryIO, stream: _Checked, text_key: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet

    plain = file.name.lower().endswith(".parquet")
    try:
        table = pa.parquet.ParquetFile(raw if plain else pa.BufferReader(stream.read()))
        if text_key not in table.schema_arrow.names:
            raise UserError(
                f"{file}: no column {text_key!r} (it has {', '.join(table.schema_arrow.names)});"
                " name the right one with --text_key"
            )
        if table.schema_arrow.names.count(text_key) > 1:
            raise UserError(f"{file}: two columns are named {text_key!r}; drop one of them")
        kind = table.schema_arrow.field(text_key).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if str(kind) not in ("string", "large_string", "string_view", "binary", "large_binary"):
            raise UserError(f"{file}: column {text_key!r} holds {kind}, not strings")
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            column = column.cast(pa.large_binary())  # Parquet promises UTF-8 and checks nothing
            for text in column.to_pylist():
                row += 1
                if text is None:
                    raise UserError(f"{file}: row {row}: {text_key!r} is null, not a string")
                try:
                    yield text.decode() if isinstance(text, bytes) else text
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{file}: row {row}: {text_key!r} is not UTF-8 ({error.reason} at byte "
                        f"{error.start}); convert the column"
                    ) from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: truncated or damaged Parquet: {str(error)[:200]}") from error
