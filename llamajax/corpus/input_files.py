"""Read documents from files: text, JSON lines, Parquet, WikiText; plain, gzip or zstd."""

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
COMPRESSIONS = (".gz", ".zst")
_BOM = "\ufeff"


def find_files(patterns: str) -> list[Path]:
    """List the files of comma-separated paths, directories and globs, each once.

    The files of a pattern are sorted. A directory means all files of a known kind in it, at any
    depth. Raises UserError for a pattern without files and for a file of an unknown kind.
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
    """List the files to read in a directory at any depth, sorted, and the names of the others.

    Follows symbolic links and ignores hidden files. Leaves out plain `.json`, which is rarely data.
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
    """Return the extension that says how to read a file, without compression; None if unknown.

    `.json` and `.ndjson` are JSON lines: C4 and Dolma name them so (`.json.gz`).
    """
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    if name.endswith((".json", ".ndjson")):
        return ".jsonl"
    return next((f for f in FORMATS if name.endswith(f)), None)


class Corpus:
    """The texts of some files, in order. Can be iterated any number of times.

    total_bytes: on disk. num_articles: of WikiText, found by the last complete iteration.
    """

    def __init__(self, files: Sequence[Path], *, text_key: str, clean: str) -> None:
        self._files, self._text_key, self._clean = files, text_key, clean
        self.total_bytes = sum(f.stat().st_size for f in files)
        self.num_articles = self._done_bytes = 0
        self._stream: BinaryIO | None = None

    @property
    def expected_text_bytes(self) -> int:
        """Estimate of the bytes of text: four times those of compressed files, as for English."""
        compressed = (*COMPRESSIONS, ".parquet")
        sizes = (f.stat().st_size for f in self._files if f.name.lower().endswith(compressed))
        return self.total_bytes + 3 * sum(sizes)

    @property
    def bytes_read(self) -> int:
        """Bytes on disk that the current iteration has passed."""
        stream = self._stream
        return self._done_bytes + (stream.tell() if stream and not stream.closed else 0)

    def __iter__(self) -> Iterator[str]:
        """Yield the texts that are more than white space. UserError names file and line."""
        self.num_articles = self._done_bytes = 0
        for file in self._files:
            try:
                with file.open("rb") as self._stream:
                    yield from self._documents(file, self._stream)
            except OSError as error:
                raise _unreadable(file, error) from error
            self._done_bytes += file.stat().st_size

    def _documents(self, file: Path, raw: BinaryIO) -> Iterator[str]:
        """Yield the documents of one open file; subclasses override this."""
        for text in self._texts(file, raw):
            if text and not text.isspace():
                yield text

    def _texts(self, file: Path, raw: BinaryIO) -> Iterator[str]:
        form, stream = format_of(file), decompressed(file, raw)
        if form == ".parquet":
            rows = _parquet_rows(file, raw, stream, self._text_key)
        elif form == ".jsonl":
            rows = _json_rows(file, stream, self._text_key)
        elif form == ".txt" and self._clean == "none":
            rows = [_decode(file, stream.read(), 0).removeprefix(_BOM)]
        else:
            rows = _lines(file, stream)
        if form not in (".tokens", ".raw") and self._clean != "wikitext":
            yield from rows
            return
        lines = wikitext.lines_of(rows) if form in (".parquet", ".jsonl") else rows
        for article in wikitext.articles(lines):
            self.num_articles += not article.isspace()
            yield wikitext.clean(article) if self._clean == "wikitext" else article


def warn_of_single_article(clean: str, num_articles: int) -> None:
    """Warn if cleaning found one article only in all files."""
    if clean == "wikitext" and num_articles == 1:
        say(
            "warning: --clean=wikitext found a single article in all files: no line ` = Title = ` "
            "follows a blank line; is this WikiText?"
        )


def read_text(file: Path) -> str:
    """Read a whole text file, decompressed if its name says so, without a byte order mark.

    Raises UserError if it cannot be read, is damaged or is not UTF-8.
    """
    try:
        with file.open("rb") as raw:
            data = decompressed(file, raw).read()
    except OSError as error:
        raise _unreadable(file, error) from error
    return _decode(file, data, 0).removeprefix(_BOM)


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file}: cannot be read: {error.strerror or error}")


class _Decompressed(io.RawIOBase):
    """A decompressed stream that raises UserError for a damaged file."""

    def __init__(self, file: Path, stream: Any) -> None:
        self._file, self._inner = file, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inner.read(len(buffer))
        except (EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's error; those of gzip and of Arrow's zstd have no number
            raise UserError(f"{self._file}: truncated or damaged: {error}") from error
        buffer[: len(data)] = data
        return len(data)


def decompressed(file: Path, raw: io.BufferedReader) -> io.RawIOBase:
    """Return the decompressed content of an open file. Reading it raises UserError for damage."""
    name = file.name.lower()
    if problem := lfs_problem(raw.peek(100)):
        raise UserError(f"{file}: {problem}")
    if name.endswith(".gz"):
        return _Decompressed(file, gzip.GzipFile(fileobj=raw))
    if name.endswith(".zst"):
        import pyarrow as pa

        return _Decompressed(file, pa.CompressedInputStream(raw, "zstd"))
    return _Decompressed(file, raw)


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
    """Yield lines with their ends; only a newline ends one."""
    offset = 0
    for line in io.BufferedReader(stream, 1 << 20):
        text = _decode(file, line, offset)
        yield text.removeprefix(_BOM) if offset == 0 else text
        offset += len(line)


def numbered_lines(file: Path, stream: io.RawIOBase) -> Iterator[tuple[int, str]]:
    """Yield the lines that are more than white space, each with its number in the file."""
    for number, line in enumerate(_lines(file, stream), 1):
        if not line.isspace():
            yield number, line


def json_object(line: str) -> dict[str, Any]:
    """Parse a line that holds a JSON object. Raises UserError without the place."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"a {type(value).__name__}, not a JSON object")
    return value


def _json_rows(file: Path, stream: io.RawIOBase, text_key: str) -> Iterator[str]:
    for number, line in numbered_lines(file, stream):
        try:
            value = json_object(line)
        except UserError as error:
            raise UserError(f"{file}:{number}: {error}") from error
        if text_key not in value:
            raise UserError(
                f"{file}:{number}: no key {text_key!r} in this object (it has"
                f" {', '.join(map(repr, value)) or 'none'}); name the right one with --text_key"
            )
        text = value[text_key]
        if not isinstance(text, str):
            raise UserError(
                f"{file}:{number}: {text_key!r} is a {type(text).__name__}, not a string"
            )
        yield text


def _parquet_rows(file: Path, raw: BinaryIO, stream: io.RawIOBase, text_key: str) -> Iterator[str]:
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
                    yield text.decode()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{file}: row {row}: {text_key!r} is not UTF-8 ({error.reason} at byte "
                        f"{error.start}); convert the column"
                    ) from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: truncated or damaged Parquet: {str(error)[:200]}") from error
