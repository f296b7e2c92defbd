"""Read the values of JSON files: one a line, or the items of an array that is the whole file."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamajax.corpus import input_files
from llamajax.corpus.long_text import LONG_CHARS, long_json
from llamajax.errors import UserError

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
# Characters at the end of a chunk that may be half an escape, number or constant.
_LONGEST_TOKEN = 16


def json_values(
    file: Path, stream: io.BufferedReader, *, long_texts: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yield the place and value of each line or item, in bounded memory.

    A UserError stands for a line that cannot be read. long_texts: a LongText stands for a long
    string in a line. Raises UserError where the file cannot be read on.
    """
    if ".json" in [suffix.lower() for suffix in file.suffixes[-2:]]:
        start = stream.peek(1).removeprefix(codecs.BOM_UTF8).lstrip()
        if start.startswith(b"["):
            yield from _array_items(file, stream)
            return
        if start.startswith((b"{\n", b"{\r")):
            raise UserError(
                f"{file}: one JSON object over several lines; what is read is an array of objects, "
                "or an object on each line"
            )
    for number, offset, line in input_files.byte_lines(stream):
        if input_files.is_blank(line):
            continue
        place = f"{file}:{number}"
        try:
            if long_texts and len(line) > LONG_CHARS:
                yield place, long_json(line, place)
            else:
                yield place, json.loads(input_files.decode(place, line, offset))
        except UserError as error:
            yield place, error
        except (ValueError, RecursionError) as error:
            yield place, UserError(f"{place}: not valid JSON: {error}")


def _array_items(file: Path, stream: io.BufferedReader) -> Iterator[tuple[str, Any]]:
    """Yield the place and value of each item of an array, which is read in chunks."""
    chunks = input_files.decoded_chunks(file, stream)
    text, number, wanted, ended = "", 0, 0, False
    while not ended:
        chunk = next(chunks, None)
        if isinstance(chunk, UserError):
            raise chunk
        ended = chunk is None
        text += chunk or ""
        if len(text) < wanted and not ended:
            continue  # an item that was not whole is parsed again when there is twice as much
        text, at = text.lstrip(), 0
        while at < len(text) and text[at] != "]":
            if text[at] not in "[,":
                raise UserError(f"{file}: row {number + 1}: not valid JSON: no comma before it")
            try:
                start = _SPACE.match(text, at + 1).end()
                if text[at] == "[" and text[start : start + 1] == "]":
                    at = start
                    break
                value, end = _DECODER.raw_decode(text, start)
            except (ValueError, RecursionError) as error:
                may_go_on = getattr(error, "pos", -1) >= len(text.rstrip()) - _LONGEST_TOKEN
                if ended or not (may_go_on or str(error).startswith("Unterminated string")):
                    place = f"{file}: row {number + 1}"
                    raise UserError(f"{place}: truncated or not valid JSON: {error}") from error
                break
            end = _SPACE.match(text, end).end()
            if end == len(text) and not ended:  # of a number there may be more
                break
            at, number = end, number + 1
            yield f"{file}: row {number}", value
        text, wanted = text[at:], 2 * (len(text) - at)
    if text.rstrip() != "]":
        raise UserError(f"{file}: truncated or not valid JSON: its array does not end the file")
