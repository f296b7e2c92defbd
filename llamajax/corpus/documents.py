"""The documents of input files: checked first, then read as often as needed."""

import collections
import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from llamajax.corpus import input_files, wikitext
from llamajax.corpus.columnar import object_rows
from llamajax.corpus.input_patterns import InputFile
from llamajax.corpus.json_values import json_values
from llamajax.corpus.long_text import LongText, document_of, split_at
from llamajax.corpus.prepare_options import PrepareOptions
from llamajax.errors import UserError, combine, say

_NAMED = 10
# Of a problem, all but its first words: its place, and what is particular to the row.
_KEY = r"(prompt|completion|instruction|input|output)"
_REASON = re.compile(rf"^.*?: ((row|message) \d+: |{_KEY}( and {_KEY})*: )*|\s*[:;(].*$", re.DOTALL)


@dataclasses.dataclass
class LeftOut:
    """What of the input is not in the output as it is: bad rows, blank texts, unsafe cuts.

    reasons: bad rows by the first words of their problem. unsafe_cuts: change a token. without_bos,
    without_eos: documents of the input that were tokens and lack these.
    """

    rows: int = 0
    first: list[str] = dataclasses.field(default_factory=list)
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    blank: int = 0
    unsafe_cuts: int = 0
    without_bos: int = 0
    without_eos: int = 0

    def add(self, problem: str) -> None:
        """Count a bad row; name it if it is among the first."""
        self.rows += 1
        self.first += [problem][: _NAMED - len(self.first)]
        reason = _REASON.sub("", problem)
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def error(self) -> UserError:
        """Return the error that names the first bad rows."""
        count = f"the first {_NAMED} problems" if self.rows > _NAMED else f"{self.rows}"
        return combine(
            self.first,
            title=f"--input cannot be used as it is ({count}); mend it, or leave bad rows out with "
            "--on_error=skip:",
        )

    def say(self) -> None:
        """Warn of what was left out."""
        if self.rows:
            shown = "".join(f"\n  - {problem}" for problem in self.first)
            more = "" if self.rows <= _NAMED else f"\n  - and {self.rows - _NAMED:,} more"
            rows = "1 row of --input is" if self.rows == 1 else f"{self.rows:,} rows of --input are"
            say(f"warning: {rows} left out:{shown}{more}")
        if self.unsafe_cuts:
            say(
                f"warning: {self.unsafe_cuts:,} cuts within texts of which this tokenizer has no "
                "place that can be cut without changing a token: some tokens beside a cut differ"
            )

    def record(self) -> dict[str, Any]:
        """Return what differs from nothing, for the manifest."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value}

    def merge(self, other: dict[str, Any]) -> None:
        """Add the record of another part of the input."""
        self.rows += other.get("rows", 0)
        self.first = [*self.first, *other.get("first", [])][:_NAMED]
        for reason, count in other.get("reasons", {}).items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.blank += other.get("blank", 0)
        self.unsafe_cuts += other.get("unsafe_cuts", 0)


class Corpus:
    """The texts of some files, in order. Can be iterated any number of times.

    total_bytes: on disk. num_articles: of WikiText, found by the last complete iteration.
    left_out: what the last check found. declared: the splits that its files are declared to be of,
    each with the number of successive documents; the last check has filled it.
    """

    def __init__(self, files: Sequence[InputFile], options: PrepareOptions) -> None:
        self._files, self._options = files, options
        self.total_bytes = sum(f.size for f in files)
        self.declared: list[tuple[str, int]] = []
        self.num_articles = self._done_bytes = 0
        self._stream: BinaryIO | None = None
        self.left_out = LeftOut()
        self._bad: set[int] = set()
        self.report: Callable[[], None] = lambda: None

    @property
    def expected_text_bytes(self) -> int:
        """Estimate of the bytes of text: four times those of compressed files, as for English."""
        compressed = (*input_files.COMPRESSIONS, ".parquet")
        sizes = (f.size for f in self._files if f.path.name.lower().endswith(compressed))
        return self.total_bytes + 3 * sum(sizes)

    @property
    def bytes_read(self) -> int:
        """Bytes on disk that the current iteration has passed."""
        stream = self._stream
        return self._done_bytes + (stream.tell() if stream and not stream.closed else 0)

    def check(self) -> Iterator[int]:
        """Read all documents and yield the characters of each.

        Bad rows are counted in `left_out`. If they are not to be skipped, raises UserError that
        names the first ten: at the end, or as soon as there are more.
        """
        self.left_out, self._bad = LeftOut(), set()
        self.declared.clear()
        for number, (file, row) in enumerate(self._rows()):
            try:
                if isinstance(row, UserError):
                    raise row
                size = sum(map(len, row)) if isinstance(row, LongText) else len(row)
            except UserError as error:
                self._bad.add(number)
                self.left_out.add(str(error))
                if self._options.on_error == "stop" and self.left_out.rows > _NAMED:
                    raise self.left_out.error() from None
            else:
                split = file.split or "train"
                if not self.declared or self.declared[-1][0] != split:
                    self.declared.append((split, 0))
                self.declared[-1] = split, self.declared[-1][1] + 1
                yield size
        if self._options.on_error == "stop" and self._bad:
            raise self.left_out.error()

    def __iter__(self) -> Iterator[str | LongText]:
        """Yield the texts that are more than white space, without bad rows where those are skipped.

        A LongText has to be read before the next document is asked for. Raises UserError for a bad
        row that is not skipped.
        """
        for number, (_, row) in enumerate(self._rows()):
            is_bad = number in self._bad
            if isinstance(row, UserError) and not is_bad:
                raise row
            if not is_bad:
                yield row
            if isinstance(row, LongText):
                with contextlib.suppress(UserError) if is_bad else contextlib.nullcontext():
                    collections.deque(row, maxlen=0)

    def _rows(self) -> Iterator[tuple[InputFile, Any]]:
        """Yield documents, each with its file; a UserError for a bad row and for a damaged file."""
        self.num_articles = self._done_bytes = self.left_out.blank = 0
        for file in self._files:
            try:
                with file.path.open("rb") as self._stream:
                    for row in self._documents(file, self._stream):
                        self.report()
                        yield file, row
            except OSError as error:
                problem = f"{file.path}: cannot be read: {error.strerror or error}"
                if self._options.on_error == "skip":  # another try may find it readable
                    raise UserError(problem) from error
                yield file, UserError(problem)
            except UserError as error:
                yield file, error
            self._done_bytes += file.size

    def _documents(self, file: InputFile, raw: BinaryIO) -> Iterator[Any]:
        """Yield the documents and bad rows of one open file; subclasses override this."""
        for text in self._texts(file, raw):
            if not isinstance(text, str) or (text and not text.isspace()):
                yield text
            else:
                self.left_out.blank += 1

    def _texts(self, file: InputFile, raw: BinaryIO) -> Iterator[Any]:
        path, options, form = file.path, file.options, input_files.format_of(file.path)
        stream, key = input_files.decompressed(path, raw), options.text_key
        if form in (".parquet", ".arrow"):
            wanted = f"{key!r}; name the right one with --text_key"
            rows = _texts_of(object_rows(path, raw, stream, [key], wanted=wanted), key)
        elif form == ".jsonl":
            rows = _texts_of(json_values(path, stream, long_texts=True), key)
        elif form == ".txt" and options.clean == "none":
            chunks = self._watched(input_files.decoded_chunks(path, stream))
            rows = _documents_of(split_at(chunks, options.document_separator))
        else:
            rows = input_files.lines_of(path, stream)
        if form not in (".tokens", ".raw") and options.clean != "wikitext":
            yield from rows
            return
        problems: list[UserError] = []
        lines = _good(rows, problems)
        if form in (".parquet", ".arrow", ".jsonl"):
            lines = wikitext.lines_of(lines)
        for article in wikitext.articles(lines):
            self.num_articles += not article.isspace()
            yield wikitext.clean(article) if options.clean == "wikitext" else article
        yield from problems

    def _watched(self, chunks: Iterator[Any]) -> Iterator[Any]:
        for chunk in chunks:
            self.report()
            yield chunk


def _good(rows: Iterator[Any], problems: list[UserError]) -> Iterator[str]:
    """Yield whole texts; collect the bad rows, and what ends the file too early."""
    try:
        for row in rows:
            if isinstance(row, UserError):
                problems.append(row)
            else:
                yield row if isinstance(row, str) else "".join(row)
    except UserError as error:
        problems.append(error)


def _documents_of(texts: Iterator[Iterator[str]]) -> Iterator[str | LongText | UserError]:
    """Yield the document of each text; a UserError for one that cannot be read."""
    for chunks in texts:
        try:
            yield document_of(chunks)
        except UserError as error:
            yield error


def warn_of_single_article(files: Sequence[InputFile], num_articles: int) -> None:
    """Warn if cleaning found one article only in all files."""
    if num_articles == 1 and any(file.options.clean == "wikitext" for file in files):
        say(
            "warning: --clean=wikitext found a single article in all files: no line ` = Title = ` "
            "follows a blank line; is this WikiText?"
        )


def _texts_of(rows: Iterable[tuple[str, Any]], text_key: str) -> Iterator[Any]:
    """Yield the text of each object, which comes with its place; a UserError for a bad one."""
    for place, value in rows:
        try:
            is_bad = isinstance(value, UserError)
            yield value if is_bad else _text_of(input_files.checked_object(value), text_key)
        except UserError as error:
            yield UserError(f"{place}: {error}")


def _text_of(value: dict[str, Any], text_key: str) -> str | LongText:
    """Return the text in an object. Raises UserError without the place."""
    if text_key not in value:
        raise UserError(
            f"no key {text_key!r} in this object (it has"
            f" {', '.join(map(repr, value)) or 'none'}); name the right one with --text_key"
        )
    text = value[text_key]
    if not isinstance(text, str | LongText):
        kind = "null" if text is None else f"of type {type(text).__name__}"
        raise UserError(f"{text_key!r} is {kind}, not a string")
    return text
