"""What a session shows: text as it comes, JSON lines, and the loop that reads prompts."""

import json
import sys
from collections.abc import Sequence
from typing import TextIO

from llamajax.decoding.generator import Session
from llamajax.decoding.prompts import Prompt
from llamajax.decoding.text import IdStream, TextStream, decoded
from llamajax.errors import UserError, say


def write_json(session: Session, prompts: Sequence[Prompt], out: TextIO) -> None:
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
    session: Session, prompts: Sequence[Prompt], out: TextIO, *, with_prompt: bool
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


def converse(session: Session, lines: TextIO, out: TextIO) -> None:
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


def _stream(session: Session, prompt: Prompt) -> TextStream | IdStream:
    if session.tokenizer is None:
        return IdStream()
    return TextStream(session.tokenizer, prompt.ids)


def _prompt_text(session: Session, prompt: Prompt) -> str:
    return "" if session.tokenizer is None else decoded(session.tokenizer, prompt.ids)
