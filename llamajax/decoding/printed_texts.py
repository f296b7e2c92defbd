"""Printing of generated text: as it comes, as JSON lines, and for prompts that are typed."""

import json
import sys
from collections.abc import Sequence
from typing import TextIO

from llamajax.data import Tokenizer
from llamajax.decoding.generator import Generator
from llamajax.decoding.prompts import Prompt
from llamajax.errors import UserError, say

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what the bytes of half a character decode to


def decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of ids; those that the model has and the tokenizer has not give nothing."""
    return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])


class TextStream:
    """Text that continues a prompt's, piece by piece: what `feed` and `finish` return, joined.

    Tokens are decoded together with those before them, back to the last place where a character
    ended. So a space that a tokenizer drops at the start of a text stays, and the cost is linear.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._before, self._new = list(prompt_ids), []

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; an unfinished character waits for the rest of it."""
        self._new += ids
        text = self._text()
        if text.endswith(_BROKEN):
            return ""
        if text:
            self._before, self._new = self._new, []
        return text

    def finish(self) -> str:
        """What was held back."""
        text, self._new = self._text(), []
        return text

    def _text(self) -> str:
        before = decoded(self._tokenizer, self._before)
        return decoded(self._tokenizer, self._before + self._new)[len(before) :]


class IdStream:
    """The same for a model without a tokenizer: ids between commas."""

    def __init__(self) -> None:
        self._comma = ""

    def feed(self, ids: Sequence[int]) -> str:
        """The ids."""
        if not ids:
            return ""
        text, self._comma = self._comma + ",".join(map(str, ids)), ","
        return text

    def finish(self) -> str:
        """Nothing is ever held back."""
        return ""


def write_json(session: Generator, prompts: Sequence[Prompt], out: TextIO) -> None:
    """One object a prompt, in order, one line each, when the whole batch is complete."""
    new_ids: list[list[int]] = [[] for _ in prompts]
    for update in session.generate(prompts):
        for ids, more in zip(new_ids, update, strict=True):
            ids += more
    for prompt, ids in zip(prompts, new_ids, strict=True):
        text = None if session.tokenizer is None else decoded(session.tokenizer, ids)
        row = {"prompt_ids": list(prompt.ids), "output_ids": ids, "text": text}
        print(json.dumps(row), file=out, flush=True)


def write_text(
    session: Generator, prompts: Sequence[Prompt], out: TextIO, *, with_prompt: bool
) -> None:
    """Each prompt's text as it comes; the next ones wait until those before are complete."""
    new_ids: list[list[int]] = [[] for _ in prompts]
    streams = [_stream(session, prompt) for prompt in prompts]
    waiting, shown = list(range(len(prompts))), 0
    if with_prompt:
        out.write(_prompt_text(session, prompts[0]))
        out.flush()
    for update in session.generate(prompts):
        for ids, more in zip(new_ids, update, strict=True):
            ids += more
        while waiting:
            row = waiting[0]
            out.write(streams[row].feed(new_ids[row][shown:]))
            shown = len(new_ids[row])
            if not prompts[row].is_complete(new_ids[row], session.stop_ids):
                break
            out.write(streams[row].finish() + "\n")
            waiting.pop(0)
            shown = 0
            if waiting and with_prompt:
                out.write("\n" + _prompt_text(session, prompts[waiting[0]]))
        out.flush()


def converse(session: Generator, lines: TextIO, out: TextIO) -> None:
    """A prompt a line until the end of the input; each is continued on its own."""
    number = 0
    while True:
        if lines.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = lines.readline()
        if not line:
            return
        text = line.rstrip("\r\n")
        if not text:
            continue
        try:
            prompt = session.typed(text, number=number)
        except UserError as error:
            say(f"error: {error}")
            continue
        number += 1
        if session.request.json:
            write_json(session, [prompt], out)
        else:
            write_text(session, [prompt], out, with_prompt=False)


def _stream(session: Generator, prompt: Prompt) -> TextStream | IdStream:
    if session.tokenizer is None:
        return IdStream()
    return TextStream(session.tokenizer, prompt.ids)


def _prompt_text(session: Generator, prompt: Prompt) -> str:
    return "" if session.tokenizer is None else decoded(session.tokenizer, prompt.ids)
