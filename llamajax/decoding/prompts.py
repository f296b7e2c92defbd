"""Prompts for the model from texts, files and ids; those that it cannot continue are refused."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llamajax.config.schema import ModelConfig
from llamajax.corpus.input_files import json_object, read_numbered_lines
from llamajax.data import Tokenizer
from llamajax.decoding.generate_options import GenerateOptions
from llamajax.errors import UserError, combine
from llamajax.tokenizers.chat import OWN_TEMPLATE, encode_chat
from llamajax.tokenizers.special_tokens import model_ids

DEFAULT_MAX_NEW_TOKENS = 128  # or what the context has room for
_LISTED = 10  # problems of a file that are named


class Prompt(NamedTuple):
    """Token ids and the limit of new ones; the random bits of those depend on `number`."""

    number: int
    ids: Sequence[int]
    max_new_tokens: int

    def is_complete(self, new_ids: Sequence[int], stop_ids: Sequence[int]) -> bool:
        """Whether nothing follows these new tokens."""
        return len(new_ids) >= self.max_new_tokens or bool(new_ids and new_ids[-1] in stop_ids)


def read_prompts(
    options: GenerateOptions, model: ModelConfig, tokenizer: Tokenizer | None
) -> list[Prompt]:
    """Return the prompts that the flags give, numbered from 0. One UserError for all problems."""
    if options.prompt_ids is not None:
        named = [("--prompt_ids", list(options.prompt_ids))]
    else:
        texts = [("--prompt", options.prompt)]
        if options.prompt is None:
            texts = list(_file_texts(Path(options.prompts_file)))
        named = [(name, text_ids(text, tokenizer, options.chat_template)) for name, text in texts]
    if not named:
        raise UserError(f"--prompts_file={options.prompts_file}: holds no prompt")
    prompts, problems = [], []
    for number, (name, ids) in enumerate(named):
        try:
            prompts.append(as_prompt(ids, model, options.max_new_tokens, number=number, name=name))
        except UserError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise combine(problems, title="these prompts cannot be continued:", listed=_LISTED)
    return prompts


def text_ids(text: str, tokenizer: Tokenizer | None, chat_template: str) -> list[int]:
    """BOS and the tokens of a text; with a template, a chat in which it is the user's message."""
    if tokenizer is None:
        raise UserError(
            "this checkpoint has no tokenizer, so that text cannot be read: put its tokenizer file "
            "into the checkpoint's directory, or give token ids with --prompt_ids=1,2,3"
        )
    if chat_template == "none":
        return [*tokenizer.start_ids, *tokenizer.encode(text)]
    if chat_template == OWN_TEMPLATE:
        from llamajax.tokenizers.chat_jinja import encode_with_own_template  # imports Jinja

        return encode_with_own_template(tokenizer, [{"role": "user", "content": text}])
    return encode_chat(tokenizer, chat_template, [{"role": "user", "content": text}])


def as_prompt(
    ids: Sequence[int],
    model: ModelConfig,
    max_new_tokens: int | None,
    *,
    number: int,
    name: str,
    flag: str = "--max_new_tokens",
) -> Prompt:
    """Check that the model has room for a prompt.

    name, flag: where it and `max_new_tokens` came from, for messages.
    """
    if wrong := [i for i in ids if not 0 <= i < model.vocab_size]:
        raise UserError(
            f"{name}: token id {wrong[0]} is outside the model's vocabulary, "
            f"0..{model.vocab_size - 1}"
        )
    if not ids:
        raise UserError(f"{name}: is empty, and texts of this tokenizer begin without a BOS token")
    room = model.max_seq_len - len(ids)
    if room < (max_new_tokens or 1):
        wanted = f"{max_new_tokens} new ones" if max_new_tokens else "a new one"
        least = model.max_seq_len - (max_new_tokens or 1)
        fix = "shorten the prompt" if room < 1 else f"set {flag} to at most {room}"
        if room >= 1 and least >= 1:
            fix += f", or shorten the prompt to {least} tokens"
        raise UserError(
            f"{name}: {len(ids)} tokens and {wanted} are more than the model's context of "
            f"{model.max_seq_len} tokens: {fix}"
        )
    return Prompt(number, ids, max_new_tokens or min(DEFAULT_MAX_NEW_TOKENS, room))


def eos_ids(path: Path, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The tokens that end a text, by the model's directory, else by the tokenizer."""
    return model_ids(path).eos_ids or (() if tokenizer is None else tokenizer.stop_ids)


def _file_texts(file: Path) -> Iterator[tuple[str, str]]:
    """Yield name and text of each prompt of a file: JSON lines with `prompt`, or one a line."""
    lines = read_numbered_lines(file)
    is_json = ".jsonl" in file.suffixes
    if lines and not is_json:
        with contextlib.suppress(UserError):
            is_json = "prompt" in json_object(lines[0][1])
    for number, line in lines:
        name = f"{file}:{number}"
        if not is_json:
            yield name, line.rstrip("\r\n")
            continue
        try:
            value = json_object(line).get("prompt")
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        if not isinstance(value, str):
            raise UserError(f'{name}: no text under "prompt" in this object')
        yield name, value
