"""Tools in Llama 3.1's chat template: write OpenAI's form of messages as plain texts with roles.

Source: the template in tokenizer_config.json of meta-llama/Llama-3.1-8B-Instruct (SHA-256
e10ca381b1cc), which Llama 3.3 shares; Llama 3.2's differs in its date, which is that of the day.
Here the date is the one that the template falls back to, so that data are reproducible.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

TOOL_TEMPLATE = "llama3.1"  # the one that can write tools
PYTHON_TAG, EOM = "<|python_tag|>", "<|eom_id|>"
_DATES = "Cutting Knowledge Date: December 2023\nToday Date: "
_TODAY = "26 Jul 2024"
_ENVIRONMENT = "Environment: ipython\n"
_GUIDE = (
    "Given the following functions, please respond with a JSON for a function call with its proper "
    "arguments that best answers the given prompt.\n\nRespond in the format {\"name\": function "
    "name, \"parameters\": dictionary of argument name and its value}.Do not use variables.\n\n"
)  # fmt: skip


class Message(NamedTuple):
    """What one side said. An answer of weight 0 carries no loss.

    before, end: names of control tokens around the text, where they are not the template's own.
    """

    role: str
    content: str
    weight: float = 1
    before: str = ""
    end: str = ""

    @property
    def learned(self) -> bool:
        """Whether its tokens carry loss."""
        return self.role == "assistant" and self.weight > 0


class ToolOffer(NamedTuple):
    """The tools of a conversation: definitions of functions, and names of built-in tools."""

    tools: Sequence[Mapping[str, Any]] = ()
    builtin: Sequence[str] = ()


def parse_offer(example: Mapping[str, Any]) -> tuple[ToolOffer, list[str]]:
    """Return what `tools` and `builtin_tools` of an example offer, and what is wrong with them."""
    tools, builtin = from_json(example.get("tools") or ()), example.get("builtin_tools") or ()
    problems = []
    if not isinstance(tools, list | tuple) or not all(isinstance(t, Mapping) for t in tools):
        problems.append("tools is no list of objects")
    if not isinstance(builtin, list | tuple) or not all(isinstance(b, str) for b in builtin):
        problems.append("builtin_tools is no list of names")
    return ToolOffer(tools, builtin), problems


def problems_of_call(item: Mapping[str, Any], builtin: Sequence[str] = ()) -> list[str]:
    """List what the template cannot express of a message with `tool_calls`."""
    calls = item["tool_calls"]
    if item.get("role") != "assistant":
        return [f"tool_calls in a message of role {item.get('role')!r}: only assistants call"]
    if item.get("content"):
        return [f"text beside a call: {TOOL_TEMPLATE} writes one of the two"]
    if not isinstance(calls, list) or len(calls) != 1:
        return [
            f"tool_calls is no list of one call: {TOOL_TEMPLATE} has no parallel calls; give each "
            "call a message of its own, with its result after it"
        ]
    function = calls[0].get("function") if isinstance(calls[0], Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return ["its call has no function with a name"]
    arguments = from_json(function.get("arguments"))
    if not isinstance(arguments, Mapping):
        return ["arguments of the call are no object, nor the JSON of one"]
    if function["name"] in builtin and not all(isinstance(v, str) for v in arguments.values()):
        return [f"arguments of the built-in tool {function['name']} are not all strings"]
    return []


def written(messages: Sequence[Mapping[str, Any]], offer: ToolOffer) -> tuple[Message, ...]:
    """Return messages in OpenAI's form as the texts that the template writes.

    messages: a conversation without problems; the first of the user's gets the definitions.
    """
    has_system = messages[0]["role"] == "system"
    head = _ENVIRONMENT if offer.tools or offer.builtin else ""
    if offer.builtin:
        listed = [name for name in offer.builtin if name != "code_interpreter"]
        head += f"Tools: {', '.join(listed)}\n\n"
    head += f"{_DATES}{_TODAY}\n\n"
    found = [Message("system", head + (messages[0]["content"].strip() if has_system else ""))]
    found += [_written(message, offer) for message in messages[has_system:]]
    if offer.tools and len(found) > 1:
        tools = "".join(f"{_json(tool, indent=4)}\n\n" for tool in offer.tools)
        found[1] = found[1]._replace(content=_GUIDE + tools + found[1].content)
    return tuple(found)


def _written(message: Mapping[str, Any], offer: ToolOffer) -> Message:
    role, weight = message["role"], message.get("weight", 1)
    if role == "tool":  # in quotes, if it is a string
        return Message("ipython", _json(message["content"]), weight)
    if not message.get("tool_calls"):
        return Message(role, message["content"].strip(), weight)
    function = message["tool_calls"][0]["function"]
    name, arguments = function["name"], from_json(function["arguments"])
    end = EOM if offer.builtin else ""
    if name in offer.builtin:
        given = ", ".join(f'{key}="{value}"' for key, value in arguments.items())
        return Message(role, f"{name}.call({given})", weight, PYTHON_TAG, end)
    text = f'{{"name": "{name}", "parameters": {_json(arguments)}}}'
    return Message(role, text, weight, "", end)


def _json(value: Any, indent: int | None = None) -> str:
    """Return JSON as `tojson` of transformers' templates."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def from_json(value: Any) -> Any:
    """Return the value of a JSON text, as OpenAI gives arguments; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


# The same for Hugging Face, where the date may be given, and arguments are no JSON text: a
# template cannot read one.
JINJA = r"""
{%- set builtin = builtin_tools | default([], true) -%}
{%- set begin, end = '<|start_header_id|>', '<|end_header_id|>\n\n' -%}
{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' -%}
{{- '<|begin_of_text|>' + begin + 'system' + end + ('ENVIRONMENT' if tools or builtin else '') -}}
{%- if builtin -%}
  {{- 'Tools: ' + builtin | reject('equalto', 'code_interpreter') | join(', ') + '\n\n' -}}
{%- endif -%}
{{- 'DATES' + date_string | default('TODAY') + '\n\n' + system + '<|eot_id|>' -}}
{%- for m in messages[1 if messages[0].role == 'system' else 0:] -%}
  {{- begin + ('ipython' if m.role == 'tool' else m.role) + end -}}
  {%- if m.role in ['tool', 'ipython'] -%}
    {{- m.content | tojson -}}
  {%- elif m.tool_calls -%}
    {%- if m.tool_calls | length > 1 -%}
      {{- raise_exception('This template has no parallel tool calls.') -}}
    {%- endif -%}
    {%- if m.content -%}
      {{- raise_exception('This template has no text beside a tool call.') -}}
    {%- endif -%}
    {%- set call = m.tool_calls[0].function -%}
    {%- if call.arguments is not mapping -%}
      {{- raise_exception('arguments: give an object') -}}
    {%- endif -%}
    {%- if call.name in builtin -%}
      {{- '<|python_tag|>' + call.name + '.call(' -}}
      {%- for key, value in call.arguments | items -%}
        {{- key + '="' + value + '"' + ('' if loop.last else ', ') -}}
      {%- endfor -%}
      {{- ')' -}}
    {%- else -%}
      {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' -}}
    {%- endif -%}
  {%- else -%}
    {%- if tools and loop.first -%}
      {{- 'GUIDE' -}}
      {%- for tool in tools -%}{{- tool | tojson(indent=4) + '\n\n' -}}{%- endfor -%}
    {%- endif -%}
    {{- m.content | trim -}}
  {%- endif -%}
  {{- '<|eom_id|>' if m.tool_calls and builtin else '<|eot_id|>' -}}
{%- endfor -%}
{{- begin + 'assistant' + end if add_generation_prompt -}}
"""
_TEXTS = {"ENVIRONMENT": _ENVIRONMENT, "GUIDE": _GUIDE, "DATES": _DATES, "TODAY": _TODAY}
for _name, _text in _TEXTS.items():
    JINJA = JINJA.replace(_name, _text.replace("\n", "\\n")).strip()
