"""Printing of generated text: as it comes, as JSON lines, and for prompts that are typed."""

import contextlib
import importlib
import json
import sys
from collections.abc import Sequence
from typing import TextIO

from llamajax.data import Tokenizer
from llamajax.decoding.generator import Generator
from llamajax.decoding.prompts import Prompt
from llamajax.errors import UserError, say

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what the bytes of half a character decode to


def decode_ids(tokenizer: Tokenizer | None, ids: Sequence[int]) -> str:
    """Text of ids; those beyond the tokenizer's vocabulary, or without one all, give nothing."""
    if tokenizer is None:
        return ""
    return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])


class TextStream:
    """Text that continues a prompt's, in pieces: `feed` and `finish` return them.

    Tokens are decoded together with those before them, back to the last end of a character. So a
    space that a tokenizer drops at the start of a text stays, and the cost is linear. Without a
    tokenizer the text is the ids between commas.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int]) -> None:
        self._tokenizer, self._comma = tokenizer, ""
        self._before, self._new = list(prompt_ids), []

    def feed(self, ids: Sequence[int]) -> str:
        """Return the text that these ids complete; an unfinished character waits for its rest."""
        if self._tokenizer is None:
            text = self._comma + ",".join(map(str, ids)) if ids else ""
            self._comma = "," if ids else self._comma
            return text
        self._new += ids
        text = self._text()
        if text.endswith(_BROKEN):
            return ""
        if text:
            self._before, self._new = self._new, []
        return text

    def finish(self) -> str:
        """Return what was held back."""
        text, self._new = self._text(), []
        return text

    def _text(self) -> str:
        before = decode_ids(self._tokenizer, self._before)
        return decode_ids(self._tokenizer, self._before + self._new)[len(before) :]


def write_json(generator: Generator, prompts: Sequence[Prompt], out: TextIO) -> None:
    """Write one object a prompt, one line each, in order, when the whole batch is complete."""
    *_, new_ids = generator.generate(prompts)
    for prompt, ids in zip(prompts, new_ids, strict=True):
        text = None if generator.tokenizer is None else decode_ids(generator.tokenizer, ids)
        row = {"prompt_ids": list(prompt.ids), "output_ids": ids, "text": text}
        print(json.dumps(row), file=out, flush=True)


def write_text(
    generator: Generator, prompts: Sequence[Prompt], out: TextIO, *, with_prompt: bool
) -> None:
    """Write each prompt's text as it comes; a prompt waits until those before it are complete."""
    tokenizer = generator.tokenizer
    streams = [TextStream(tokenizer, prompt.ids) for prompt in prompts]
    row = shown = 0  # whose text is being written; how many of its tokens are
    if with_prompt:
        out.write(decode_ids(tokenizer, prompts[0].ids))
        out.flush()
    for new_ids in generator.generate(prompts):
        while row < len(prompts):
            out.write(streams[row].feed(new_ids[row][shown:]))
            shown = len(new_ids[row])
            if not prompts[row].is_complete(new_ids[row], generator.stop_ids):
                break
            out.write(streams[row].finish() + "\n")
            row, shown = row + 1, 0
            if row < len(prompts) and with_prompt:
                out.write("\n" + decode_ids(tokenizer, prompts[row].ids))
        out.flush()


def _typed_line(lines: TextIO, out: TextIO) -> str:
    """Return the next line, with its end; on a terminal it can be edited, and recalled later."""
    if not (lines.isatty() and out.isatty()):
        if lines.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        return lines.readline()
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # `input` edits lines once this is imported
    try:
        return input("> ") + "\n"
    except EOFError:
        return ""


def converse(generator: Generator, lines: TextIO, out: TextIO) -> None:
    """Continue each line of the input by itself, until the input ends."""
    number = 0
    while line := _typed_line(lines, out):
        if not (text := line.rstrip("\r\n")):
            continue
        try:
            prompt = generator.typed(text, number=number)
        except UserError as error:
            say(f"error: {error}")
            continue
        number += 1
        if generator.options.json:
            write_json(generator, [prompt], out)
        else:
            write_text(generator, [prompt], out, with_prompt=False)
