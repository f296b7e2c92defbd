"""Encode conversations: chat templates, which tokens carry loss, and which end an answer.

Control tokens are inserted here by id. What people wrote goes through `encode`, which returns
ordinary tokens whatever a text looks like. `corpus/instructions.py` reads examples from files.

Sources: `llama/generation.py` (Llama 2) and `llama/tokenizer.py` (Llama 3) of Meta's repositories;
for llama3.1 and its tools `chat_tools.py`; for chatml the template that SmolLM2-Instruct is
published with, without its default system message.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llamajax.errors import UserError, combine
from llamajax.tokenizers import chat_tools
from llamajax.tokenizers.chat_tools import TOOL_TEMPLATE, Message
from llamajax.tokenizers.special_tokens import set_stop_ids
from llamajax.tokenizers.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
# Llama 2 writes its marks as ordinary text: a message that contains one would be misread.
_LLAMA2_MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

# Keys of OpenAI's format that change the meaning; those of tools only llama3.1 can express.
_TOOL_KEYS = ("tools", "builtin_tools", "tool_calls", "tool_call_id")
_LOST = (*_TOOL_KEYS, "functions", "function_call", "images", "audio")
# Whose message follows one of a role, and whether that one is a call of a tool.
_NEXT = {
    ("user", False): "assistant", ("assistant", False): "user",
    ("assistant", True): "tool", ("tool", False): "assistant",
}  # fmt: skip

# Token ids of a part of a conversation, and whether they carry loss.
Piece = tuple[list[int], bool]


def _plain(tokenizer: Tokenizer, messages: Sequence[Message]) -> Iterator[Piece]:
    """BOS prompt completion EOS, the two texts unchanged."""
    for message in messages:
        if message.role == "assistant":
            ids = tokenizer.encode_continuation(message.content)
            yield [*ids, tokenizer.eos_id], message.learned
        else:
            yield [*tokenizer.start_ids, *tokenizer.encode(message.content)], False


def _llama2(tokenizer: Tokenizer, messages: Sequence[Message]) -> Iterator[Piece]:
    """BOS [INST] user [/INST] answer EOS for each turn; system text goes into the first user's."""
    system, start = "", [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for message in messages:
        role, content = message.role, message.content
        if role == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif role == "user":
            text, system = f"[INST] {(system + content).strip()} [/INST]", ""
            yield [*start, *tokenizer.encode(text)], False
        else:
            # A space on either side, as Meta has it; the one before EOS is learned with the answer.
            answer = tokenizer.encode_continuation(f" {content.strip()} ")
            yield [*answer, tokenizer.eos_id], message.learned


def _llama3(tokenizer: Tokenizer, messages: Sequence[Message]) -> Iterator[Piece]:
    """A header with the role, an empty line, the message, end of turn."""
    return _llama31(tokenizer, [m._replace(content=m.content.strip()) for m in messages])


def _llama31(tokenizer: Tokenizer, messages: Sequence[Message]) -> Iterator[Piece]:
    """The same, of the texts as `chat_tools` has written them."""
    control = tokenizer.control_ids
    yield [control["<|begin_of_text|>"]], False
    for message in messages:
        yield _llama3_header(tokenizer, message.role), False
        before = [control[message.before]] if message.before else []
        text = tokenizer.encode_continuation(message.content)
        yield [*before, *text, control[message.end or "<|eot_id|>"]], message.learned


def _llama3_header(tokenizer: Tokenizer, role: str) -> list[int]:
    start, end = (tokenizer.control_ids[f"<|{name}_header_id|>"] for name in ("start", "end"))
    encode = tokenizer.encode_continuation
    return [start, *encode(role), end, *encode("\n\n")]


def _chatml(tokenizer: Tokenizer, messages: Sequence[Message]) -> Iterator[Piece]:
    """A line with the role, the message unchanged, end of turn, a newline (never learned)."""
    end, newline = tokenizer.control_ids["<|im_end|>"], tokenizer.encode_continuation("\n")
    for message in messages:
        yield _chatml_header(tokenizer, message.role), False
        yield [*tokenizer.encode_continuation(message.content), end], message.learned
        yield newline, False


def _chatml_header(tokenizer: Tokenizer, role: str) -> list[int]:
    return [tokenizer.control_ids["<|im_start|>"], *tokenizer.encode_continuation(f"{role}\n")]


class _Template(NamedTuple):
    """encode: the tokens of messages. header: those before an answer that is still to be written.

    control: names of the tokens it needs. stop: names of those that end an answer, besides EOS.
    jinja: the same template for Hugging Face.
    """

    encode: Callable[[Tokenizer, Sequence[Message]], Iterator[Piece]]
    header: Callable[[Tokenizer, str], list[int]] | None = None
    control: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    jinja: str = ""


_LLAMA3_CONTROL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
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
        control=_LLAMA3_CONTROL,
        stop=("<|eot_id|>",),
        jinja="<|begin_of_text|>{% for m in messages %}{{ '<|start_header_id|>' + m.role +"
        " '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}{{"
        " '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt }}",
    ),
    TOOL_TEMPLATE: _Template(
        _llama31,
        _llama3_header,
        control=(*_LLAMA3_CONTROL, chat_tools.PYTHON_TAG, chat_tools.EOM),
        stop=("<|eot_id|>", chat_tools.EOM),
        jinja=chat_tools.JINJA,
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
CHAT_TEMPLATES = tuple(_TEMPLATES)
OWN_TEMPLATE = "model"  # the one in the model's directory: `chat_jinja.py`


def check_template(template: str, tokenizer: Tokenizer | None) -> None:
    """Raise UserError that names every control token of the template which the tokenizer lacks.

    tokenizer: None for one that is still to be trained, which will have BOS and EOS only.
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
    """Return the token ids of a whole conversation, and for each whether it carries loss.

    Answers carry loss, with the token that ends each. `messages` have passed `parse_messages`.
    """
    ids: list[int] = []
    answer: list[bool] = []
    for piece, learned in _TEMPLATES[template].encode(tokenizer, messages):
        ids += piece
        answer += [learned] * len(piece)
    return ids, answer


def encode_chat(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids to generate the next answer from, BOS included if the template has one.

    `messages` are dicts with `role` and `content`, as in the JSON lines of `prepare`; the last is
    the user's, or a tool's. Without `add_generation_prompt`: the conversation alone, whoever spoke
    last. tools: the keys `tools` and `builtin_tools` of an example. The ids are those of training
    on the same conversation. Raises UserError for a malformed one and for control tokens that the
    tokenizer lacks.
    """
    check_template(template, tokenizer)
    parsed, problems = parse_messages(
        messages, template, last="user" if add_generation_prompt else None, example=tools
    )
    if problems:
        raise combine(problems, title="this conversation cannot be encoded:")
    ids, _ = encode_example(tokenizer, template, parsed)
    header = _TEMPLATES[template].header
    return ids + header(tokenizer, "assistant") if add_generation_prompt and header else ids


def stop_ids(tokenizer: Tokenizer, template: str) -> list[int]:
    """Return the ids that end an answer: the template's end of turn, and EOS."""
    check_template(template, tokenizer)
    ends = [tokenizer.control_ids[name] for name in _TEMPLATES[template].stop]
    return list(dict.fromkeys([*ends, tokenizer.eos_id]))


def write_template(directory: Path, tokenizer: Tokenizer, template: str) -> None:
    """Write a template, and the ids that end an answer, beside the tokenizer."""
    if template != "none":
        (directory / "chat_template.jinja").write_text(_TEMPLATES[template].jinja, "utf-8")
        set_stop_ids(directory, [*tokenizer.stop_ids, *stop_ids(tokenizer, template)])


def parse_messages(
    value: Any, template: str, *, last: str | None, example: Mapping[str, Any] | None = None
) -> tuple[tuple[Message, ...], list[str]]:
    """Return the messages of a conversation in JSON, and all that is wrong with them.

    Right is: at most one system message, then user and assistant in turn, a tool's result after
    each call, with `last` (None: either) at the end; no answer without text, no mark of Llama 2 in
    a text for its template. example: has the tools, if there are any.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (), [f"messages is of type {type(value).__name__}, not a list"]
    if not value:
        return (), ["messages is empty"]
    offer, problems = chat_tools.parse_offer(example or {})
    problems += [
        f"message {number}: {problem}"
        for number, item in enumerate(value, 1)
        for problem in problems_of_message(item, template, builtin=offer.builtin)
    ]
    problems = problems or _problems_of_order(value, template, last)
    if problems:
        return (), problems
    if template == TOOL_TEMPLATE:
        messages = chat_tools.written(value, offer)
    else:
        messages = tuple(Message(m["role"], m["content"], m.get("weight", 1)) for m in value)
    if last == "assistant" and not any(m.learned for m in messages):
        problems = ["every answer has weight 0, so nothing to learn"]
    return messages, problems


def problems_of_message(item: Any, template: str, builtin: Sequence[str] = ()) -> list[str]:
    """List what is wrong with one message, apart from its place in the conversation."""
    if not isinstance(item, Mapping):
        return [f"a {type(item).__name__}, not an object with role and content"]
    problems = problems_of_keys(item, template, known=("tool_calls", "tool_call_id"))
    if item.get("tool_calls"):
        return problems or chat_tools.problems_of_call(item, builtin)
    problems += [f"no key {key!r}" for key in ("role", "content") if key not in item]
    role, content = item.get("role", "user"), item.get("content", "")
    roles = (*ROLES, "tool") if template == TOOL_TEMPLATE else ROLES
    if role not in roles:
        hint = f"; --chat_template={TOOL_TEMPLATE} writes those of tools" if role == "tool" else ""
        problems.append(f"role {role!r} is none of {', '.join(roles)}{hint}")
    if role == "tool" and role in roles and isinstance(content, list | dict):
        return problems
    if not isinstance(content, str):
        return [*problems, f"content is of type {type(content).__name__}, not a string"]
    if role == "assistant" and "content" in item and not content.strip():
        problems.append("an answer without text")
    if template == "llama2":
        problems += [f"its text holds {m}, a mark of llama2" for m in _LLAMA2_MARKS if m in content]
    return problems


def problems_of_keys(
    item: Mapping[str, Any], template: str, known: Sequence[str] = ("tools", "builtin_tools")
) -> list[str]:
    """List the keys of a message or an example that change its meaning and would be lost.

    known: those that a template for tools reads there.
    """
    lost = [key for key in _LOST if item.get(key)]
    writer = dict.fromkeys(_TOOL_KEYS, f"--chat_template={TOOL_TEMPLATE} writes it")
    problems = [
        f"{key!r} is not supported: {writer.get(key, 'no template writes it')}"
        for key in lost
        if template != TOOL_TEMPLATE or key not in known
    ]
    if item.get("weight", 1) not in (0, 1):
        problems.append(f"weight {item['weight']!r} is neither 0 nor 1")
    return problems


def _problems_of_order(
    messages: Sequence[Mapping[str, Any]], template: str, last: str | None
) -> list[str]:
    roles = [message["role"] for message in messages]
    problems, has_system = [], roles[0] == "system"
    turns = roles[has_system:]
    calls = [bool(message.get("tool_calls")) for message in messages[has_system:]]
    due = ["user"] + [_NEXT.get((role, call)) for role, call in zip(turns, calls, strict=True)]
    wrong = [i for i, role in enumerate(turns) if role != due[i]]
    if "assistant" not in roles and last == "assistant":
        problems.append("no assistant message, so nothing to learn")
    elif wrong:
        number = wrong[0] + 1 + has_system
        problems.append(
            f"message {number} is the {turns[wrong[0]]}'s where the {due[wrong[0]]}'s is due:"
            " perhaps a system message, then user and assistant in turn, and after a call its"
            " result"
        )
    elif not turns or (last and _NEXT[turns[-1], False] != _NEXT[last, False]):
        problems.append(f"the last message is the {roles[-1]}'s, not the {last or 'user'}'s")
    if template == "none" and (len(turns) > 2 or has_system):
        problems.append("a conversation needs a --chat_template; none takes a prompt alone")
    return problems
