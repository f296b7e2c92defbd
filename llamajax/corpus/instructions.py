"""Read examples for finetuning from JSON lines: a prompt with its completion, or a conversation."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from llamajax.corpus import input_files
from llamajax.corpus.documents import Corpus, placed
from llamajax.corpus.prepare_options import PrepareOptions
from llamajax.errors import UserError
from llamajax.tokenizers.chat import Message, parse_messages, problems_of_keys, problems_of_message


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A conversation that ends with an answer."""

    messages: tuple[Message, ...]

    def __len__(self) -> int:
        """Return the characters of all messages."""
        return sum(len(m.content) for m in self.messages)

    @property
    def answers(self) -> list[str]:
        """The texts that carry loss."""
        return [m.content for m in self.messages if m.learned]


class InstructionCorpus(Corpus):
    """The examples of some files, in order. Can be iterated any number of times."""

    def __init__(self, files: Sequence[Path], options: PrepareOptions) -> None:
        super().__init__(files, options)
        if others := [f.name for f in files if input_files.format_of(f) != ".jsonl"]:
            kinds = " and ".join(f".jsonl{c}" for c in ("", *input_files.COMPRESSIONS))
            raise UserError(f"--format=instructions reads {kinds}, not {', '.join(others)}")

    def _documents(self, file: Path, raw: BinaryIO) -> Iterator[Any]:
        for number, offset, line in input_files.byte_lines(input_files.decompressed(file, raw)):
            try:
                value = input_files.json_object(input_files.decode(file, line, offset))
                messages, problems = parse_example(value, self._options.chat_template)
                if problems:
                    raise UserError("; ".join(problems))
                yield Example(messages)
            except input_files.FileError:
                raise
            except UserError as error:
                yield placed(error, file, number)


def parse_example(value: dict[str, Any], template: str) -> tuple[tuple[Message, ...], list[str]]:
    """Return the messages of a line's object, and all that is wrong with it."""
    pair = [key for key in ("prompt", "completion") if key in value]
    if wrong := problems_of_keys(value):
        return (), wrong
    if value.get("weight", 1) == 0:
        return (), ["an example of weight 0 has nothing to learn: leave it out"]
    if "messages" in value:
        if pair:
            return (), [f"both messages and {' and '.join(pair)}: keep one of the two forms"]
        return parse_messages(value["messages"], template, last="assistant")
    if len(pair) < 2:
        has = ", ".join(map(repr, value)) or "none"
        return (), [f"neither prompt and completion nor messages (its keys: {has})"]
    messages = Message("user", value["prompt"]), Message("assistant", value["completion"])
    problems = [
        f"{key}: {problem}"
        for key, message in zip(pair, messages, strict=True)
        for problem in problems_of_message(message._asdict(), template)
    ]
    return messages, problems
