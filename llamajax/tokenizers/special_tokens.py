"""Special tokens of a tokenizer, as the files beside it state them.

Hugging Face spreads these facts over `tokenizer_config.json`, `special_tokens_map.json`,
`added_tokens.json`, `generation_config.json` and `config.json`. Only this file reads them.
"""

import dataclasses
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llamajax.errors import UserError
from llamajax.files import read_json_object

# Files that belong to a tokenizer of Hugging Face, and its model's defaults for sampling.
_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_PAD_NAMES = ("[PAD]", "<pad>", "<PAD>", "<|pad|>")
# Padding, and tokens that chat templates insert by id. No text encodes to them.
_ALWAYS_CONTROL = (
    "<|im_start|>", "<|im_end|>", *_PAD_NAMES,
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
_ENDS = ("bos_token", "eos_token")
_OTHER_NAMES = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>")
_EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|im_end|>")
# What transformers assumes for these `tokenizer_class`es if tokenizer_config.json names no token.
_OF_CLASS = {
    "Llama": ("<s>", "</s>"),
    "CodeLlama": ("<s>", "</s>"),
    "GPT2": ("<|endoftext|>", "<|endoftext|>"),
}


class ModelIds(NamedTuple):
    """The ids that a model's directory states; None or empty where it states none."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFacts:
    """What the files beside a tokenizer state.

    named: `bos_token`, `eos_token`, `pad_token` ...; None where a file says that there is none.
    added: id of each added token, and whether it is special. chat_template: Jinja's source.
    add_bos: `add_bos_token`, if stated.
    """

    named: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    added: Mapping[str, tuple[int, bool]] = dataclasses.field(default_factory=dict)
    model: ModelIds = dataclasses.field(default_factory=ModelIds)
    chat_template: str | None = None
    add_bos: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The tokens of a tokenizer that are no piece of ordinary text.

    bos_id: None if there is none. adds_bos: whether texts begin with it. control_ids: by name; no
    text encodes to them. added_ids: by name, of ordinary added tokens. warnings: on the choice.
    """

    bos_id: int | None
    eos_id: int
    adds_bos: bool = True
    control_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    added_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_facts(file: Path) -> TokenFacts:
    """Read the files beside a tokenizer's file. Raises UserError for a malformed one.

    A file with a name of its own (`llama2.model`) may stand beside other models' files: no facts.
    """
    if not file.name.startswith("tokenizer"):
        return TokenFacts()
    config = _read_object(file.with_name("tokenizer_config.json"))
    legacy = _read_object(file.with_name("special_tokens_map.json"))
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast").removesuffix("Tokenizer")
    named = dict(zip(_ENDS, _OF_CLASS[kind], strict=True)) if kind in _OF_CLASS else {}
    special = set()
    for source in (legacy, config):
        named |= {k: _content(source[k]) for k in (*_ENDS, *_OTHER_NAMES) if k in source}
        special |= {_content(value) for key, value in source.items() if key.endswith("_token")}
        for key in ("additional_special_tokens", "extra_special_tokens"):
            if isinstance(source.get(key), list):
                special |= {_content(token) for token in source[key]}
    listed = _read_object(file.with_name("added_tokens.json"))
    decoder = config.get("added_tokens_decoder") or {}
    try:
        added = {name: (int(i), name in special) for name, i in listed.items()}
        added |= {t["content"]: (int(i), bool(t.get("special"))) for i, t in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{file.parent}: added_tokens.json or added_tokens_decoder of tokenizer_config.json is "
            "malformed; copy it again"
        ) from None
    add_bos = config.get("add_bos_token")
    template = _chat_template(file.with_name("chat_template.jinja"), config.get("chat_template"))
    return TokenFacts(
        named=named,
        added=added,
        model=model_ids(file.parent),
        chat_template=template,
        add_bos=add_bos if isinstance(add_bos, bool) else None,
    )


def _chat_template(file: Path, configured: Any) -> str | None:
    """Read the chat template: a file of its own comes before tokenizer_config.json, as there.

    configured: one template, or a list of them by name, of which the default counts.
    """
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except ValueError as error:
            raise UserError(f"{file}: not UTF-8 ({error}); copy it again") from None
    if isinstance(configured, list):
        configured = [each for each in configured if isinstance(each, dict)]
        named = {each.get("name"): each.get("template") for each in configured}
        configured = named.get("default")
    return configured if isinstance(configured, str) else None


def model_ids(directory: Path) -> ModelIds:
    """Read BOS, EOS and pad ids: from generation_config.json, else config.json, as transformers.

    Raises UserError for an EOS that is no id.
    """
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        config = _read_object(directory / name)
        found |= {key: config[key] for key in _IDS if config.get(key) is not None}
        eos = config.get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if wrong := [i for i in ids if type(i) is not int or i < 0]:
            raise UserError(
                f"{directory / name}: eos_token_id holds {wrong[0]!r}; it must be a token id or a "
                "list of them"
            )
        found |= {"eos_token_id": tuple(ids)} if ids else {}
    bos, pad = (i if type(i := found.get(key)) is int and i >= 0 else None for key in _IDS[::2])
    return ModelIds(bos, found.get("eos_token_id", ()), pad)


def find_special_tokens(
    path: Path,
    facts: TokenFacts,
    vocab: Mapping[str, int],
    *,
    own: tuple[int | None, int | None],
    added: Mapping[str, tuple[int, bool]],
) -> SpecialTokens:
    """Return BOS and EOS, and divide the `added` tokens (id, whether special) into two kinds.

    BOS and EOS are in this order: the names in tokenizer_config.json, what the tokenizer's file
    states (`own`), the model's ids, well-known names among the added tokens. Of these, the ones
    that are special, that chat templates insert, or that are BOS or EOS are control tokens; the
    others are ordinary.
    """
    known = set(vocab.values())
    named = [vocab.get(facts.named.get(key) or "") for key in _ENDS]
    model = (facts.model.bos_id, next(iter(facts.model.eos_ids), None))
    bos, eos = (
        next((i for i in each if i is not None and i in known), None)
        for each in zip(named, own, model, strict=True)
    )
    if eos is None:
        eos = next((vocab[n] for n in _EOS_NAMES if n in added), None)
    no_bos = facts.named.get("bos_token", "") is None
    if no_bos:
        bos = None
    elif bos is None and named[1] is None:
        bos = next((vocab[n] for n in _BOS_NAMES if n in added), None)
    one, warnings = eos if bos is None else bos, ()
    if one is not None and (eos is None or (bos is None and named[1] is None and not no_bos)):
        name = next(n for n, i in vocab.items() if i == one)
        warnings = (
            f"{path}: {name} is BOS and EOS, for want of another; "
            "name bos_token and eos_token in tokenizer_config.json if that is wrong",
        )
        bos = eos = one
    if eos is None:
        raise UserError(
            f"{path}: no BOS or EOS token found, and every document ends with EOS. Name them as "
            f"bos_token and eos_token in {path.with_name('tokenizer_config.json')}. Its control "
            f"tokens: {', '.join(sorted(added)[:20]) or 'none'}"
        )
    is_control = {
        name: special or name in _ALWAYS_CONTROL or i in (bos, eos)
        for name, (i, special) in added.items()
    }
    return SpecialTokens(
        bos_id=bos,
        eos_id=eos,
        adds_bos=facts.add_bos is not False,
        control_ids={name: i for name, (i, _) in added.items() if is_control[name]},
        added_ids={name: i for name, (i, _) in added.items() if not is_control[name]},
        warnings=warnings,
    )


def foreign_tokens(path: Path, ids: Collection[int], size: int) -> UserError:
    """Return the error for added tokens whose ids do not follow a vocabulary of `size` tokens."""
    return UserError(
        f"{path}: the added tokens beside it have the ids {sorted(ids)}, and not those that follow "
        f"the {size} tokens in it: they belong to another model"
    )


def num_used(vocab: Mapping[str, int]) -> int:
    """Count the ids, without padding at the end: models often have no row for it."""
    names = {i: name for name, i in vocab.items()}
    size = max(names) + 1
    while names.get(size - 1) in _PAD_NAMES:
        size -= 1
    return size


def copy_companions(file: Path, directory: Path) -> None:
    """Copy the files that belong to a tokenizer's file.

    The model's BOS, EOS and pad ids go into generation_config.json, wherever they were stated.
    """
    if not file.name.startswith("tokenizer"):
        return
    for name in _COMPANIONS:
        if file.with_name(name).is_file():
            shutil.copyfile(file.with_name(name), directory / name)
    write_model_ids(directory, model_ids(file.parent))


def write_model_ids(directory: Path, ids: ModelIds) -> None:
    """Add ids to generation_config.json; what it states already stays."""
    file = directory / "generation_config.json"
    given = _read_object(file)
    eos = list(ids.eos_ids) if len(ids.eos_ids) > 1 else next(iter(ids.eos_ids), None)
    wanted = dict(zip(_IDS, (ids.bos_id, eos, ids.pad_id), strict=True))
    new = {k: v for k, v in wanted.items() if v is not None and given.get(k) is None}
    if new:
        file.write_text(json.dumps(given | new, indent=2) + "\n", "utf-8")


def set_stop_ids(directory: Path, ids: Sequence[int]) -> None:
    """Set the EOS ids of generation_config.json."""
    file = directory / "generation_config.json"
    config = _read_object(file) | {"eos_token_id": list(dict.fromkeys(ids))}
    file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _read_object(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file; empty if there is no file."""
    return read_json_object(file) if file.is_file() else {}


def _content(value: Any) -> str | None:
    """Return the text of a token that is written as a string or as an object."""
    return value.get("content") if isinstance(value, dict) else value
