"""Encode a conversation with the chat template that a model's directory has.

A template is a program in Jinja, written by whoever published the model. It runs in Jinja's
sandbox, with the names and filters that transformers 5.24 gives it (`apply_chat_template`), and
tokens are those of transformers. What people wrote becomes no control token, as long as the
template passes it on unchanged: one that changes letters (`| lower`) can make the name of one.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llamajax.errors import UserError
from llamajax.tokenizers.tokenizer import Tokenizer, any_of

# Stands within a message where its text spells a control token; a noncharacter of Unicode.
_AS_TEXT = "\ufdd0"
# What a template can raise, apart from Jinja's own errors: it may compute whatever it likes.
_RAISED = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


class _Generation(Extension):
    """`{% generation %}`: marks answers for a loss mask, and changes no text."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


def encode_with_own_template(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Return the tokens of a conversation in the model's own chat template.

    messages: dicts with `role` and `content`. Raises UserError where there is no template, where it
    is no valid one, and where it refuses the conversation.
    """
    control = any_of(tokenizer.control_ids)

    def marked(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        text = value.replace(_AS_TEXT, "")
        return control.sub(lambda found: found[0][0] + _AS_TEXT + found[0][1:], text)

    text = render(
        tokenizer,
        [{key: marked(value) for key, value in message.items()} for message in messages],
        add_generation_prompt=add_generation_prompt,
    )
    return tokenizer.encode_rendered(text, as_text=_AS_TEXT)


def render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
) -> str:
    """Return the text of a conversation. Raises UserError as `encode_with_own_template`."""
    where, source = tokenizer.file or tokenizer.kind, tokenizer.facts.chat_template
    if source is None:
        raise UserError(
            f"--chat_template=model: there is no chat template beside {where} "
            "(chat_template.jinja, or chat_template in tokenizer_config.json); put the model's own "
            "there, or name a form: --chat_template=llama2, llama3 or chatml"
        )
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    names = {i: name for name, i in tokenizer.control_ids.items()}
    named = {**tokenizer.facts.named, **{key: names[i] for key, i in ends.items() if i in names}}
    try:
        return _environment().from_string(source).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **{key: name for key, name in named.items() if name is not None},
        )  # fmt: skip
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template beside {where} is not valid in line {error.lineno}: {error.message}"
        ) from None
    except _Refused as error:
        raise UserError(f"the chat template beside {where} refuses this chat: {error}") from None
    except _RAISED as error:
        raise UserError(
            f"the chat template beside {where} fails ({type(error).__name__}: {error}); it may "
            "need tools or documents, which generate has not. Mend it, or name a form: "
            "--chat_template=llama2, llama3 or chatml"
        ) from None


class _Refused(jinja2.TemplateError):
    """The template called `raise_exception`."""


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )

    def raise_exception(message: str) -> NoReturn:
        raise _Refused(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment
