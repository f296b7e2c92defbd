"""Texts that are too long to be held whole: they are read once, chunk by chunk."""

import collections
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from llamajax.errors import UserError

LONG_CHARS = 1 << 22
CHUNK = 1 << 20  # bytes or characters
_ESCAPE_OR_QUOTE = re.compile(rb'\\.|"', re.DOTALL)
_FIRST_HALF = re.compile(rb"\\u[dD][89abAB]..")
# Stands for a long string while the rest of its JSON line is parsed.
_PLACEHOLDER = "\ufdd0long string "


class LongText:
    """The chunks of a text, in order; whoever iterates over them takes them."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks = chunks
        self._rest = ""

    def __iter__(self) -> Iterator[str]:
        while chunk := self._next():
            yield chunk

    def take(self, count: int) -> Iterator[str]:
        """Yield the next `count` characters."""
        while count > 0 and (chunk := self._next()):
            chunk, self._rest = chunk[:count], chunk[count:]
            count -= len(chunk)
            yield chunk

    def _next(self) -> str:
        chunk, self._rest = self._rest, ""
        return chunk or next((c for c in self._chunks if c), "")


def document_of(chunks: Iterator[str]) -> str | LongText:
    """Return a text of the chunks, whole unless it is long. A long one is more than white space."""
    taken: list[str] = []
    size, is_blank = 0, True
    for chunk in chunks:
        taken.append(chunk)
        size += len(chunk)
        is_blank = is_blank and chunk.isspace()
        if size > LONG_CHARS and not is_blank:
            return LongText(itertools.chain(taken, chunks))
    return "".join(taken)


def split_at(chunks: Iterator[str | UserError], separator: str) -> Iterator[Iterator[str]]:
    """Yield the chunks of each text between separators; each is to be read before the next.

    separator: may be empty; then there is one text. Reading a text raises the first UserError that
    is among its chunks; the text after it is whole again.
    """
    found = _chunks_and_ends(chunks, separator)
    for first in found:
        text = _text(itertools.chain([first], found))
        yield text
        collections.deque(text, maxlen=0)


def _chunks_and_ends(
    chunks: Iterator[str | UserError], separator: str
) -> Iterator[str | UserError | None]:
    """Yield what is in each text, and None after it. A separator may lie across two chunks."""
    rest, kept = "", max(0, len(separator) - 1)  # characters that may begin a separator
    for chunk in chunks:
        if isinstance(chunk, UserError):
            yield chunk
            rest = ""
            continue
        rest += chunk
        *texts, rest = rest.split(separator) if separator else [rest]
        for text in texts:
            yield text
            yield None
        yield rest[: max(0, len(rest) - kept)]
        rest = rest[max(0, len(rest) - kept) :]
    yield rest
    yield None


def _text(found: Iterator[str | UserError | None]) -> Iterator[str]:
    for chunk in iter(found.__next__, None):
        if isinstance(chunk, UserError):
            collections.deque(iter(found.__next__, None), maxlen=0)
            raise chunk
        yield chunk


def long_json(line: bytes, where: str) -> Any:
    """Parse a JSON line whose long strings become LongTexts: in memory it is held once, as bytes.

    Raises UserError for JSON that is not valid; within a long string, when that is read.
    """
    skeleton, strings = [], {}
    at = after = 0
    while (start := line.find(b'"', after)) >= 0:
        escapes = _ESCAPE_OR_QUOTE.finditer(line, start + 1)
        end = next((found.start() for found in escapes if found[0] == b'"'), len(line))
        if end - start > LONG_CHARS:
            name = f"{_PLACEHOLDER}{len(strings)}"
            strings[name] = start + 1, end
            skeleton += [line[at:start], json.dumps(name).encode()]
            at = end + 1
        after = end + 1
    try:
        value = json.loads(b"".join([*skeleton, line[at:]]).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error} (long strings left out)") from error
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, str) and item in strings:
                start, end = strings[item]
                value[key] = document_of(_string_chunks(line, start, end, where))
    return value


def _string_chunks(line: bytes, start: int, end: int, where: str) -> Iterator[str]:
    """Decode the inside of a JSON string in chunks."""
    while start < end:
        cut = _whole_characters(line, min(start + CHUNK, end), end)
        try:
            yield json.loads(f'"{line[start:cut].decode("utf-8")}"')
        except UnicodeDecodeError as error:
            at = start + error.start
            raise UserError(f"{where}: not UTF-8: byte 0x{line[at]:02x} at {at}") from error
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON: {error} (from byte {start} on)") from error
        start = cut


def _whole_characters(line: bytes, cut: int, end: int) -> int:
    """Return the first place from `cut` on that is within no character, escape or pair of those."""
    last = line.rfind(b"\\", cut - 6, cut)
    if last >= 0:
        first = last
        while line[first - 1 : first] == b"\\":
            first -= 1
        if (last - first) % 2 == 0:  # an odd number of backslashes: the last begins an escape
            cut = max(cut, last + (6 if line[last + 1 : last + 2] == b"u" else 2))
            # The first half of a surrogate pair, and then the second.
            while _FIRST_HALF.fullmatch(line, cut - 6, cut) and line[cut : cut + 2] == b"\\u":
                cut += 6
    while cut < end and line[cut] & 0xC0 == 0x80:
        cut += 1
    return min(cut, end)
