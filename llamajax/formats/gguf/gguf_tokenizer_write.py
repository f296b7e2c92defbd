"""Describe a tokenizer in GGUF's metadata, as llama.cpp's converter does.

What is written is read back, and left out with a warning unless it makes the same tokens of sample
texts.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.formats.gguf.gguf_header import GgufHeader
from llamajax.formats.gguf.gguf_tokenizer import write_tokenizer
from llamajax.tokenizers import Tokenizer, load_tokenizer
from llamajax.tokenizers.tokenizer_export import export_tokenizer
from llamajax.tokenizers.tokenizer_identity import same_tokens

_KEY = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_PRE = ("llama-bpe", "smollm", "gpt-2")  # how text is split into words: the first that fits
_ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>")
# Digits, letters that a normalizer would change, spaces: what the kinds of tokenizers differ in.
_SAMPLES = (
    "1234567 89",
    "e\u0301 \ufb01 \u212b",
    " a  b\n\n\tc\u00a0d",
    "it's IT'S \u00e9t\u00e9 \U0001f600",
)


def tokenizer_metadata(
    tokenizer: Tokenizer | None, vocab_size: int, path: Path
) -> tuple[dict[str, Any], list[str]]:
    """Return the keys `tokenizer.*` of a model with so many rows, and warnings. path: the file."""
    none = {f"{_KEY}model": "no_vocab"}
    if tokenizer is None:
        return none, []
    with tempfile.TemporaryDirectory() as folder:
        export_tokenizer(tokenizer, Path(folder))
        file = Path(folder) / "tokenizer.json"
        spec = json.loads(file.read_text("utf-8")) if file.is_file() else {"model": {}}
    pieces = spec["model"].get("byte_fallback", False)
    for pre in (("default",) if pieces else _PRE) if spec["model"].get("type") == "BPE" else ():
        facts = _facts(tokenizer, vocab_size, spec, pre)
        metadata = {_KEY + key: value for key, value in facts.items()}
        header = GgufHeader(path=path, metadata=metadata, tensors={}, content=None)
        file = write_tokenizer(header)
        found = None if file is None else load_tokenizer(file)
        if found is not None and _makes_same_tokens(found, tokenizer):
            template = tokenizer.facts.chat_template
            lost = sorted({*tokenizer.stop_ids} - {*found.stop_ids})
            words = f"GGUF has keys for three stop tokens: {path} does not name {lost}"
            return metadata | ({"tokenizer.chat_template": template} if template else {}), (
                [words] if lost else []
            )
    return none, [
        f"{tokenizer.file} is of a kind that llama.cpp has no name for: {path} holds no tokenizer"
    ]


def _makes_same_tokens(found: Tokenizer, wanted: Tokenizer) -> bool:
    samples = (*_SAMPLES, *(f"a{name}\tb" for name in wanted.added_ids))
    same = all(found.encode(sample) == wanted.encode(sample) for sample in samples)
    return same and same_tokens(found, wanted)


def _facts(tokenizer: Tokenizer, vocab_size: int, spec: dict[str, Any], pre: str) -> dict[str, Any]:
    """Return the keys `tokenizer.ggml.*` for a tokenizer.json.

    SentencePiece merges the neighbors that give the piece of the highest score. The number of a
    piece's first merge in tokenizer.json has that order.
    """
    model, pieces = spec["model"], spec["model"].get("byte_fallback", False)
    vocab = dict(model["vocab"])
    types = dict.fromkeys(vocab.values(), _NORMAL)
    if pieces:
        types |= {i: _BYTE for name, i in vocab.items() if re.fullmatch("<0x[0-9A-F]{2}>", name)}
    for token in spec.get("added_tokens") or []:
        vocab[token["content"]] = token["id"]
        types[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    types |= dict.fromkeys(tokenizer.control_ids.values(), _CONTROL)
    named, padding = tokenizer.facts.named, tokenizer.facts.model.pad_id
    unknown = vocab.get(model.get("unk_token"))
    if unknown is not None:
        types[unknown] = _UNKNOWN
    unknown = vocab.get(named.get("unk_token"), unknown)
    padding = vocab.get(named.get("pad_token"), padding)
    names = {i: name for name, i in vocab.items()}
    found = {
        "model": "llama" if pieces else "gpt2",
        "pre": pre,
        "tokens": [names.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "token_type": np.array([types.get(i, _UNUSED) for i in range(vocab_size)], np.int32),
        "eos_token_id": tokenizer.eos_id,
        "add_bos_token": bool(tokenizer.start_ids),
        "add_eos_token": False,
    }
    turn = [i for i in tokenizer.stop_ids if i != tokenizer.eos_id]
    turn.sort(key=lambda i: names.get(i) not in _ENDS_OF_TURN)
    ids = {"bos": tokenizer.bos_id, "unknown": unknown, "padding": padding}
    ids |= dict(zip(("eot", "eom"), turn, strict=False))  # ends of a turn, and of a message in it
    found |= {f"{key}_token_id": i for key, i in ids.items() if i in names and i < vocab_size}
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    if not pieces:
        return found | {"merges": [" ".join(pair) for pair in merges]}
    rank = {"".join(pair): -n for n, pair in reversed(list(enumerate(merges)))}
    scores = np.array([rank.get(name, 0) for name in found["tokens"]])
    prefix = "Prepend" in json.dumps(spec.get("normalizer")) or "Metaspace" in json.dumps(spec)
    return found | {"scores": scores.astype(np.float32), "add_space_prefix": prefix}
