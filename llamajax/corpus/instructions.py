"""Read examples for finetuning: a prompt with its completion, or a conversation.

Layouts of others: ShareGPT's `conversations` of `from` and `value`, with tools as LLaMA-Factory has
them (its data/README.md and data/glaive_toolcall_en_demo.json); Alpaca's `instruction`, `input` and
`output` (the file of tatsu-lab/stanford_alpaca).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from llamajax.corpus import input_files
from llamajax.corpus.columnar import object_rows
from llamajax.corpus.documents import Corpus
from llamajax.corpus.input_patterns import InputFile
from llamajax.corpus.json_values import json_values
from llamajax.corpus.prepare_options import PrepareOptions
from llamajax.errors import UserError, listed
from llamajax.tokenizers.chat import Message, parse_messages, problems_of_keys
from llamajax.tokenizers.chat_tools import from_json

_READ = (".jsonl", ".parquet", ".arrow")
# The keys by which each form of an example is recognized.
_FORMS = (
    ("messages",), ("prompt", "completion"), ("conversations",), ("instruction", "output"),
)  # fmt: skip
# Columns that are read: those of the forms, and those that change what an example means.
_KEYS = (
    *(key for form in _FORMS for key in form), "input", "system", "history", "weight", "tools",
    "builtin_tools", "tool_calls", "functions", "function_call", "images", "audio",
)  # fmt: skip
# ShareGPT's names of the roles.
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


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

    def __init__(self, files: Sequence[InputFile], options: PrepareOptions) -> None:
        super().__init__(files, options)
        if others := [f.path.name for f in files if input_files.format_of(f.path) not in _READ]:
            raise UserError(
                f"--format=instructions reads {', '.join(_READ)}, not {listed(others, most=10)}; "
                "prepare texts into a directory of their own and train on both: "
                "--config.data.path=data/a,data/b"
            )

    def _documents(self, file: InputFile, raw: BinaryIO) -> Iterator[Any]:
        stream = input_files.decompressed(file.path, raw)
        if input_files.format_of(file.path) == ".jsonl":
            rows = json_values(file.path, stream)
        else:
            rows = object_rows(file.path, raw, stream, _KEYS, wanted="column of an example")
            rows = ((place, _without_nulls(value)) for place, value in rows)
        for place, value in rows:
            if isinstance(value, UserError):
                yield value
                continue
            try:
                value = input_files.checked_object(value)
                messages, problems = parse_example(value, self._options.chat_template)
                if problems:
                    raise UserError("; ".join(problems))
                yield Example(messages)
            except UserError as error:
                yield UserError(f"{place}: {error}")


def parse_example(value: dict[str, Any], template: str) -> tuple[tuple[Message, ...], list[str]]:
    """Return the messages of a row's object, and all that is wrong with it."""
    if "conversations" in value and "tools" in value:
        value = value | {"tools": _definitions(value["tools"])}
    if wrong := problems_of_keys(value, template):
        return (), wrong
    if value.get("weight", 1) == 0:
        return (), ["an example of weight 0 has nothing to learn: leave it out"]
    forms = [form for form in _FORMS if all(key in value for key in form)]
    if len(forms) > 1:
        forms = [form for form in forms if all(value[key] is not None for key in form)] or forms
    names = [" and ".join(form) for form in forms or _FORMS]
    if not forms:
        has = ", ".join(map(repr, value)) or "none"
        return (), [f"neither {', nor '.join(names)} (its keys: {has})"]
    if len(forms) > 1:
        return (), [f"has {', as well as '.join(names)}: keep one of these forms"]
    (form,) = forms
    if form == ("prompt", "completion"):
        turns = [_turn("user", value["prompt"]), _turn("assistant", value["completion"])]
        messages, problems = parse_messages(turns, template, last="assistant", example=value)
        for number, key in enumerate(form, 1):
            problems = [problem.replace(f"message {number}: ", f"{key}: ") for problem in problems]
        return messages, problems
    if form == ("instruction", "output"):
        return _parse_alpaca(value, template)
    turns = value[form[0]]
    if turns == []:
        return (), [f"{form[0]} is empty"]
    if isinstance(turns, list):
        turns = [*_system(value), *map(_message_of, turns)]
    return parse_messages(turns, template, last="assistant", example=value)


def _parse_alpaca(value: dict[str, Any], template: str) -> tuple[tuple[Message, ...], list[str]]:
    """Return the messages of an instruction with its input, a blank line between them."""
    texts = [value["instruction"], value.get("input") or "", value["output"]]
    names = ("instruction", "input", "output")
    if wrong := [n for n, text in zip(names, texts, strict=True) if not isinstance(text, str)]:
        return (), [f"{' and '.join(wrong)}: not a string"]
    if value.get("history"):
        return (), ["'history' is not supported: write the turns as messages"]
    if template == "none":
        return (), ["an instruction needs a --chat_template: with none its answer runs into it"]
    asked = "\n\n".join(text for text in texts[:2] if text.strip())
    turns = [*_system(value), _turn("user", asked), _turn("assistant", texts[2])]
    return parse_messages(turns, template, last="assistant", example=value)


def _without_nulls(value: Any) -> Any:
    """Return a value without the keys whose value is null, at any depth.

    A column has a null wherever other rows have a key.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _system(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the system message that stands beside the turns, if any."""
    return [_turn("system", value["system"])] if value.get("system") else []


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _definitions(tools: Any) -> Any:
    """Return definitions of tools in OpenAI's form, of those in LLaMA-Factory's; others as is."""
    tools = from_json(tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return tools
    return [t if "function" in t else {"type": "function", "function": t} for t in tools]


def _message_of(item: Any) -> Any:
    """Return a message in OpenAI's form; what is not of ShareGPT's layout as it is."""
    if not isinstance(item, dict) or "role" in item or not {"from", "value"} <= item.keys():
        return item
    rest = {key: value for key, value in item.items() if key not in ("from", "value")}
    role, said = item["from"], item["value"]
    if role == "function_call":
        calls = from_json(said)
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "tool_calls": [{"function": call} for call in calls], **rest}
    role = role if isinstance(role, str) else repr(role)
    return {"role": _ROLES.get(role, role), "content": said, **rest}
