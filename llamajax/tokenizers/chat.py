"""Conversations as token ids: the chat templates, what of them carries loss, and where to stop.

Control tokens are placed here, by id; what people wrote goes through `encode`, which gives
ordinary tokens whatever a text looks like. Reading examples from files is in `instructions.py`.

Sources: `llama/generation.py` (Llama 2) and `llama/tokenizer.py` (Llama 3) of Meta's repositories;
for chatml the template that SmolLM2-Instruct is published with, without its default system message.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llamajax.errors import UserError, combine
from llamajax.tokenizers.loading import Tokenizer
from llamajax.tokenizers.special_tokens import add_stop_ids

CHAT_TEMPLATES = ("none", "llama2", "llama3", "chatml")
ROLES = ("system", "user", "assistant")
# Llama 2 writes its marks as ordinary text, so a message that holds one cannot be told from them.
_LLAMA2_MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

# Keys of OpenAI's format for what a text template here cannot express.
_LOST = ("tools", "tool_calls", "tool_call_id", "functions", "function_call", "images", "audio")

# Token ids of a part of a conversation, and whether they carry loss.
Piece = tuple[list[int], bool]


class Message(NamedTuple):
    """What one side said; `role` is one of ROLES. An answer of weight 0 carries no loss."""

    role: str
    content: str
    weight: float = 1

    @property
    def learned(self) -> bool:
        """Whether its tokens carry loss."""
        return self.role == "assistant" and self.weight > 0


class _Template(NamedTuple):
    pieces: Callable[[Tokenizer, Sequence[Message]], Iterator[Piece]]
    header: Callable[[Tokenizer], list[int]] = lambda _: []  # of an answer still to be written
    control: tuple[str, ...] = ()  # the tokens it needs by name
    stop: tuple[str, ...] = ()  # those that end an answer, besides EOS
    jinja: str = ""  # the same as Hugging Face writes it


def _plain(tokenizer: Tokenizer, messages: Sequence[Message]) -> Iterator[Piece]:
    """BOS prompt completion EOS, the two texts as they are."""
    for message in messages:
        if message.role == "assistant":
            ids = tokenizer.encode_continuation(message.content)
            yield [*ids, tokenizer.eos_id], message.learned
        else:
            yield [*tokenizer.start_ids, *tokenizer.encode(message.content)], False


def _llama2(tokenizer: Tokenizer, messages: Sequence[Message]) -> Iterator[Piece]:
    """BOS [INST] user [/INST] answer EOS a turn; the system's words stand in the first user's."""
    system = ""
    for message in messages:
        role, content, _ = message
        if role == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif role == "user":
            text, system = f"[INST] {(system + content).strip()} [/INST]", ""
            yield [*tokenizer.start_ids, *tokenizer.encode(text)], False
        else:
            # A space on either side, as Meta has it; the one before EOS is learned with the answer.
            answer = tokenizer.encode_continuation(f" {content.strip()} ")
            yield [*answer, tokenizer.eos_id], message.learned


def _llama3(tokenizer: Tokenizer, messages: Sequence[Message]) -> Iterator[Piece]:
    """A header with the role, an empty line, the message, end of turn."""
    control = tokenizer.control_ids
    yield [control["<|begin_of_text|>"]], False
    for message in messages:
        yield _llama3_header(tokenizer, message.role), False
        text = tokenizer.encode_continuation(message.content.strip())
        yield [*text, control["<|eot_id|>"]], message.learned


def _llama3_header(tokenizer: Tokenizer, role: str = "assistant") -> list[int]:
    start, end = (tokenizer.control_ids[f"<|{name}_header_id|>"] for name in ("start", "end"))
    continued = tokenizer.encode_continuation
    return [start, *continued(role), end, *continued("\n\n")]


def _chatml(tokenizer: Tokenizer, messages: Sequence[Message]) -> Iterator[Piece]:
    """A line with the role, the message as it is, end of turn, a newline (never learned)."""
    end, newline = tokenizer.control_ids["<|im_end|>"], tokenizer.encode_continuation("\n")
    for message in messages:
        yield _chatml_header(tokenizer, message.role), False
        yield [*tokenizer.encode_continuation(message.content), end], message.learned
        yield newline, False


def _chatml_header(tokenizer: Tokenizer, role: str = "assistant") -> list[int]:
    return [tokenizer.control_ids["<|im_start|>"], *tokenizer.encode_continuation(f"{role}\n")]


_TEMPLATES = {
    "none": _Template(_plain),
    "llama2": _Template(
        _llama2,
        jinja="{% for m in messages %}{% if m.role == 'user' %}{% set first = messages[0] %}"
        "{{ bos_token + '[INST] ' + (('<<SYS>>\\n' + first.content + '\\n<</SYS>>\\n\\n' if"
        " loop.index == 2 and first.role == 'system' else '') + m.content) | trim + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}"
        "{% endfor %}",
    ),
    "llama3": _Template(
        _llama3,
        _llama3_header,
        control=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        stop=("<|eot_id|>",),
        jinja="<|begin_of_text|>{% for m in messages %}{{ '<|start_header_id|>' + m.role +"
        " '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}{{"
        " '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt }}",
    ),
    "chatml": _Template(
        _chatml,
        _chatml_header,
        control=("<|im_start|>", "<|im_end|>"),
        stop=("<|im_end|>",),
        jinja="{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content +"
        " '<|im_end|>\\n' }}{% endfor %}{{ '<|im_start|>assistant\\n' if add_generation_prompt }}",
    ),
}
assert tuple(_TEMPLATES) == CHAT_TEMPLATES


def check_template(template: str, tokenizer: Tokenizer | None) -> None:
    """UserError that names every control token of the template which the tokenizer lacks.

    None: one that is still to be trained, and will know BOS and EOS only.
    """
    known = tokenizer.control_ids if tokenizer else {}
    if missing := [name for name in _TEMPLATES[template].control if name not in known]:
        kind = f"this {tokenizer.kind} tokenizer" if tokenizer else "a tokenizer trained here"
        raise UserError(
            f"--chat_template={template} needs the control tokens {', '.join(missing)}, which"
            f" {kind} lacks; choose another template or the tokenizer that it was made for"
        )


def encode_example(
    tokenizer: Tokenizer, template: str, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Token ids of a whole conversation, and of each whether it carries loss: the tokens of the
    answers, with the token that ends each. `messages` have passed `parse_messages`."""
    ids: list[int] = []
    answer: list[bool] = []
    for piece, learned in _TEMPLATES[template].pieces(tokenizer, messages):
        ids += piece
        answer += [learned] * len(piece)
    return ids, answer


def encode_chat(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids, BOS included where the template has one, to generate the next answer from.

    `messages` are dicts with `role` and `content`, as in the JSON lines of `prepare`; the last is
    the user's. Without `add_generation_prompt`: the conversation alone, whoever spoke last. The
    ids are those that training on the same conversation has. UserError for what is malformed or
    for control tokens that the tokenizer lacks.
    """
    check_template(template, tokenizer)
    parsed, problems = parse_messages(
        messages, template, last="user" if add_generation_prompt else None
    )
    if problems:
        raise combine(problems, title="this conversation cannot be encoded:")
    ids, _ = encode_example(tokenizer, template, parsed)
    return ids + _TEMPLATES[template].header(tokenizer) if add_generation_prompt else ids


def stop_ids(tokenizer: Tokenizer, template: str) -> list[int]:
    """Ids of the tokens any of which ends an answer: the template's end of turn, and EOS."""
    check_template(template, tokenizer)
    ends = [tokenizer.control_ids[name] for name in _TEMPLATES[template].stop]
    return list(dict.fromkeys([*ends, tokenizer.eos_id]))


def write_template(directory: Path, tokenizer: Tokenizer, template: str) -> None:
    """Write a template, and the tokens that end an answer, beside the tokenizer."""
    if template != "none":
        (directory / "chat_template.jinja").write_text(_TEMPLATES[template].jinja, "utf-8")
        add_stop_ids(directory, [*tokenizer.stop_ids, *stop_ids(tokenizer, template)])


def parse_messages(
    value: Any, template: str, *, last: str | None
) -> tuple[tuple[Message, ...], list[str]]:
    """The messages of a conversation out of JSON, and all that is wrong with them.

    Wanted: perhaps one system message, then user and assistant in turn, with `last` (None: either)
    at the end; no answer without text, no mark of Llama 2 in a text for its template.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (), [f"messages is a {type(value).__name__}, not a list"]
    if not value:
        return (), ["messages is empty"]
    messages: list[Message] = []
    problems: list[str] = []
    for number, item in enumerate(value, 1):
        wrong = problems_of_message(item, template)
        problems += [f"message {number}: {problem}" for problem in wrong]
        if not wrong:
            messages.append(Message(item["role"], item["content"], item.get("weight", 1)))
    if not problems:
        problems = _problems_of_order([m.role for m in messages], template, last)
    if not problems and last == "assistant" and not any(m.learned for m in messages):
        problems.append("every answer has weight 0, so nothing to learn")
    return tuple(messages), problems


def problems_of_message(item: Any, template: str) -> list[str]:
    """What is wrong with one message, its place in the conversation apart."""
    if not isinstance(item, Mapping):
        return [f"a {type(item).__name__}, not an object with role and content"]
    problems = [f"no key {key!r}" for key in ("role", "content") if key not in item]
    problems += problems_of_keys(item)
    role, content = item.get("role", "user"), item.get("content", "")
    if role not in ROLES:
        problems.append(f"role {role!r} is none of {', '.join(ROLES)}")
    if not isinstance(content, str):
        problems.append(f"content is a {type(content).__name__}, not a string")
        return problems
    if role == "assistant" and "content" in item and not content.strip():
        problems.append("an answer without text")
    if template == "llama2":
        problems += [f"its text holds {m}, a mark of llama2" for m in _LLAMA2_MARKS if m in content]
    return problems


def problems_of_keys(item: Mapping[str, Any]) -> list[str]:
    """What stands in a message or an example that would be lost, and changes what it means."""
    problems = [
        f"{key!r} is not supported: no template writes it" for key in _LOST if item.get(key)
    ]
    if item.get("weight", 1) not in (0, 1):
        problems.append(f"weight {item['weight']!r} is neither 0 nor 1")
    return problems


def _problems_of_order(roles: Sequence[str], template: str, last: str | None) -> list[str]:
    problems = []
    turns = roles[1:] if roles[0] == "system" else roles
    wanted = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if "assistant" not in roles and last == "assistant":
        problems.append("no assistant message, so nothing to learn")
    elif list(turns) != wanted:
        at = next(i for i, (a, b) in enumerate(zip(turns, wanted, strict=True)) if a != b)
        number = at + 1 + len(roles) - len(turns)
        problems.append(
            f"message {number} is the {turns[at]}'s where the {wanted[at]}'s is due: perhaps a"
            " system message, then user and assistant in turn"
        )
    elif not turns or last not in (None, turns[-1]):
        problems.append(f"the last message is the {roles[-1]}'s, not the {last or 'user'}'s")
    if template == "none" and (len(turns) > 2 or len(turns) < len(roles)):
        problems.append("a conversation needs a --chat_template; none takes a prompt alone")
    return problems
