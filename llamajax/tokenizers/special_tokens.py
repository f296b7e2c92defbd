"""Special tokens of a tokenizer as the files beside it state them; which ids begin and end a text.

Hugging Face spreads these facts over `tokenizer_config.json`, `special_tokens_map.json`,
`added_tokens.json`, `generation_config.json` and `config.json`. They are read here, and only here.
"""

import dataclasses
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamajax.errors import UserError

# Files that may stand beside a tokenizer of Hugging Face and belong to it, and the one that says
# how a model is sampled by default.
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_PAD_NAMES = ("[PAD]", "<pad>", "<PAD>", "<|pad|>")
# Padding, and tokens that chat templates place by id. No text encodes to them.
ALWAYS_CONTROL = (
    "<|im_start|>", "<|im_end|>", *_PAD_NAMES,
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
_ENDS = ("bos_token", "eos_token")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>")
_EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|im_end|>")
# What transformers takes for these `tokenizer_class`es where tokenizer_config.json names no token.
_OF_CLASS = {
    "Llama": ("<s>", "</s>"),
    "CodeLlama": ("<s>", "</s>"),
    "GPT2": ("<|endoftext|>", "<|endoftext|>"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What the files of one directory state.

    named: `bos_token` and `eos_token` by these keys; None where a file says that there is none.
    added: id of each added token, and whether it is special. bos_id, eos_ids, pad_id: of the model.
    """

    named: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    added: Mapping[str, tuple[int, bool]] = dataclasses.field(default_factory=dict)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None


def read_facts(file: Path) -> Facts:
    """What stands beside a tokenizer's file. Raises UserError for a file that is malformed.

    A file of a name of its own (`llama2.model`) stands among others of other models: no facts.
    """
    if not file.name.startswith("tokenizer"):
        return Facts()
    config = _read(file.with_name("tokenizer_config.json"))
    legacy = _read(file.with_name("special_tokens_map.json"))
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast").removesuffix("Tokenizer")
    named = dict(zip(_ENDS, _OF_CLASS[kind], strict=True)) if kind in _OF_CLASS else {}
    for source in (legacy, config):
        named |= {key: _content(source[key]) for key in _ENDS if key in source}
    special = {_content(value) for source in (legacy, config) for value in _flat(source)}
    listed = _read(file.with_name("added_tokens.json"))
    decoder = config.get("added_tokens_decoder") or {}
    try:
        added = {name: (int(i), name in special) for name, i in listed.items()}
        added |= {t["content"]: (int(i), bool(t.get("special"))) for i, t in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{file.parent}: added_tokens.json or added_tokens_decoder of tokenizer_config.json is "
            "malformed; copy it again"
        ) from None
    bos_id, eos_ids, pad_id = model_ids(file.parent)
    return Facts(named=named, added=added, bos_id=bos_id, eos_ids=eos_ids, pad_id=pad_id)


def model_ids(directory: Path) -> tuple[int | None, tuple[int, ...], int | None]:
    """BOS, all EOS and pad ids of a model's directory: generation_config.json before config.json,
    as transformers takes them. Raises UserError for an EOS that is no id."""
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        config = _read(directory / name)
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
    return bos, found.get("eos_token_id", ()), pad


def find_ends(
    path: Path,
    facts: Facts,
    vocab: Mapping[str, int],
    *,
    own: tuple[int | None, int | None],
    added: Collection[str],
) -> tuple[int | None, int, tuple[str, ...]]:
    """BOS (None: texts have none), EOS, and warnings.

    From the names in tokenizer_config.json, else `own`, what the tokenizer's file itself states,
    else the model's ids, else well-known names among the `added` tokens.
    """
    known = set(vocab.values())
    named = [vocab.get(facts.named.get(key) or "") for key in _ENDS]
    model = (facts.bos_id, next(iter(facts.eos_ids), None))
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
    one = eos if bos is None else bos
    if one is not None and (eos is None or (bos is None and named[1] is None and not no_bos)):
        name = next(n for n, i in vocab.items() if i == one)
        what = f"{name} begins and ends every text, for want of another"
        fix = "name bos_token and eos_token in tokenizer_config.json if that is wrong"
        return one, one, (f"{path}: {what}; {fix}",)
    if eos is None:
        raise UserError(
            f"{path}: no BOS or EOS token found, and every document ends with EOS. Name them as "
            f"bos_token and eos_token in {path.with_name('tokenizer_config.json')}. Its control "
            f"tokens: {', '.join(sorted(added)[:20]) or 'none'}"
        )
    return bos, eos, ()


def of_another_model(path: Path, ids: Collection[int], size: int) -> UserError:
    """Return the error of added tokens whose ids do not follow the vocabulary."""
    return UserError(
        f"{path}: the added tokens beside it have the ids {sorted(ids)}, and not those that follow "
        f"the {size} tokens in it: they belong to another model"
    )


def num_used(vocab: Mapping[str, int]) -> int:
    """Number of ids without padding at the end, which models often have no row for."""
    names = {i: name for name, i in vocab.items()}
    size = max(names) + 1
    while names.get(size - 1) in _PAD_NAMES:
        size -= 1
    return size


def carry_companions(file: Path, directory: Path) -> None:
    """Copy what stands beside a tokenizer's file and belongs to it.

    The model's BOS, EOS and pad ids go into generation_config.json where config.json has them.
    """
    if not file.name.startswith("tokenizer"):
        return
    for name in COMPANIONS:
        if file.with_name(name).is_file():
            shutil.copyfile(file.with_name(name), directory / name)
    bos, eos, pad = model_ids(file.parent)
    write_model_ids(directory, bos_id=bos, eos_ids=eos, pad_id=pad)


def write_model_ids(
    directory: Path, *, bos_id: int | None, eos_ids: tuple[int, ...], pad_id: int | None
) -> None:
    """Complete generation_config.json by these ids; what it states already stays."""
    file = directory / "generation_config.json"
    given = _read(file)
    eos = list(eos_ids) if len(eos_ids) > 1 else next(iter(eos_ids), None)
    ids = dict(zip(_IDS, (bos_id, eos, pad_id), strict=True))
    new = {k: v for k, v in ids.items() if v is not None and given.get(k) is None}
    if new:
        file.write_text(json.dumps(given | new, indent=2) + "\n", "utf-8")


def add_stop_ids(directory: Path, ids: Sequence[int]) -> None:
    """Have generation_config.json name these EOS ids, whatever else it states."""
    file = directory / "generation_config.json"
    given = _read(file) | {"eos_token_id": list(dict.fromkeys(ids))}
    file.write_text(json.dumps(given, indent=2) + "\n", "utf-8")


def _read(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds a {type(value).__name__}, not an object")
    return value


def _content(value: Any) -> str | None:
    """The text of a token that is written as a string or as an object."""
    return value.get("content") if isinstance(value, dict) else value


def _flat(source: Mapping[str, Any]) -> list[Any]:
    """Tokens that a file names as special."""
    singles = [value for key, value in source.items() if key.endswith("_token")]
    lists = (source.get(f"{kind}_special_tokens") for kind in ("additional", "extra"))
    return singles + [token for each in lists if isinstance(each, list) for token in each]
