"""Conversations, the published chat templates, and small byte-level tokenizers."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from llamajax.tokenizers.chat import Message

SYSTEM, ASK, TELL = (Message(r, t) for r, t in zip(
    ("system", "user", "assistant"), ("Be brief.", " Who? ", "Ahab.\n"), strict=True
))  # fmt: skip
TALK = [SYSTEM, ASK, TELL, Message("user", "Why?"), Message("assistant", "A\n\nwhale: ü 鯨")]
# Those that transformers is asked about, by template.
TALKS = {
    "llama2": (TALK[1:3], TALK, TALK[1:], TALK[1:2], TALK[:-1], TALK[1:-1]),
    "llama3": (TALK[1:3], TALK, TALK[:-1]),
    "chatml": (TALK, TALK[:-1]),
    "odd": (TALK, TALK[:-1]),
}
# As published in the tokenizer_config.json of the chat models, less their checks of the roles;
# that of SmolLM2 also less its default system message. The odd one uses what others do not: blocks
# with lines of their own, a loop that is left, JSON, the date, marks for a loss mask, tokens that
# the tokenizer may lack, and what generate never gives.
PUBLISHED = {
    "llama2": (
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' %}"
        "{% elif m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + (ns.system + m.content).strip() + ' [/INST]' }}"
        "{% set ns.system = '' %}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role +"
        " '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' +"
        " '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{% endif %}"
    ),
    "odd": """{% set ns = namespace(n=0) %}
{%- if tools is not none or documents %}{{ raise_exception('no tools') }}{% endif %}
{{ bos_token }}{{ pad_token }}{{ unk_token }}
{% for m in messages %}
    {% if loop.index > 4 %}{% break %}{% endif %}
    {% set ns.n = ns.n + 1 %}
    {% if m['role'] not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('Who is ' + m['role'] + '?') }}
    {% endif %}
    {% generation %}
    {{ ns.n }} {{ {'b': m.content, 'a': ['<é>', none, true]} | tojson }} {{ m.name }}
    {% endgeneration %}
{% endfor %}
{{ messages[0] | tojson(indent=1, sort_keys=true) }} {{ strftime_now('now') }}
{%- if add_generation_prompt %}{{ eos_token }}>{% endif %}""",
}
NAMES = {
    "llama2": {"bos_token": "<s>", "eos_token": "</s>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "chatml": {},
    "odd": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|pad|>"},
}


def dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The messages as objects of role and content."""
    return [{"role": m.role, "content": m.content, "weight": m.weight} for m in messages]


def asks(messages: Sequence[Message]) -> bool:
    """Whether the answer is still to be generated."""
    return messages[-1].role == "user"


def save_byte_level(path: Path, special: Sequence[str], *, bos: str | None = None) -> Path:
    """Write a tokenizer.json of the 256 bytes and special tokens; texts begin with `bos`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(path))
    return path


def save_chatml(path: Path) -> Path:
    """Write SmolLM2's tokenizer in small: byte-level, with its names of control tokens."""
    return save_byte_level(path, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
