"""Write the tokenizer inside a GGUF file as files that `load_tokenizer` reads.

`tokenizer.ggml.model` "llama" is a SentencePiece model taken apart: it is put together again.
"gpt2" is a byte-level BPE. `tokenizer.ggml.pre` only names how it splits text into words before
merging, so an unknown name gives no tokenizer.
"""

import atexit
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.formats.foreign_weights import note
from llamajax.formats.gguf.gguf_header import GgufHeader

_KEY = "tokenizer.ggml."
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # token types, SentencePiece's own numbers
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_PRE = (*_LLAMA3_NAMES, "smollm", "gpt-2")


def write_tokenizer(header: GgufHeader) -> Path | None:
    """Write the tokenizer to a directory that is removed when the process ends; return its file.

    None, and a note to the user, where it cannot be rebuilt exactly.
    """
    facts = {
        key.removeprefix(_KEY): value
        for key, value in header.metadata.items()
        if key.startswith(_KEY)
    }
    if reason := _unusable(facts):
        note(header.path, f"{reason}; go on without a tokenizer")
        return None
    if facts["model"] == "llama":
        content, name = _sentencepiece(facts), "tokenizer.model"
    else:
        content, name = _byte_level(facts), "tokenizer.json"
    directory = Path(tempfile.mkdtemp(prefix="llamajax-tokenizer-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    (directory / name).write_bytes(content)
    config = _config(facts, header.metadata.get("tokenizer.chat_template"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")
    ends = [facts[f"{key}_token_id"] for key in ("eos", "eot", "eom") if f"{key}_token_id" in facts]
    if len(set(ends)) > 1:  # a chat model's end of turn
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return directory / name


def _unusable(facts: Mapping[str, Any]) -> str | None:
    """Return why no tokenizer can be written, or None."""
    kind, pre = facts.get("model"), facts.get("pre")
    if kind not in ("llama", "gpt2") or (kind == "gpt2" and pre not in _PRE):
        known = ", ".join(_PRE)
        return f"tokenizer.ggml.model {kind!r}, pre {pre!r}: known are llama, and gpt2 with {known}"
    numbers = ["token_type", *(["scores"] if kind == "llama" else [])]
    kinds = dict.fromkeys(numbers, np.ndarray) | {"tokens": list}
    kinds |= {key: int for key in facts if key.endswith("_token_id")}
    kinds |= {"merges": list} if kind == "gpt2" else {}
    if odd := [key for key, is_a in kinds.items() if not isinstance(facts.get(key), is_a)]:
        return f"{_KEY}{odd[0]} is missing, or of another type"
    vocab = set(facts["tokens"])
    if any(len(facts[key]) != len(vocab) for key in ["tokens", *numbers]):
        return "its tokenizer's lists have different lengths, or two tokens of one name"
    if bad := [key for key in kinds if kinds[key] is int and not 0 <= facts[key] < len(vocab)]:
        return f"{_KEY}{bad[0]} = {facts[bad[0]]} is outside of its vocabulary"
    pairs = [merge.partition(" ")[::2] for merge in facts.get("merges", [])]
    if any(not {left, right, left + right} <= vocab for left, right in pairs):
        return "its tokenizer merges tokens that are not in its vocabulary"
    return None


def _adds_bos(facts: Mapping[str, Any]) -> bool:
    """Decide as llama.cpp does where the file does not say."""
    silent = facts.get("model") == "llama" or facts.get("pre") in _LLAMA3_NAMES
    return bool(facts.get("add_bos_token", silent))


def _config(facts: Mapping[str, Any], chat_template: str | None) -> dict[str, Any]:
    """Return what transformers reads beside the tokenizer."""
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    classes = {"llama": "LlamaTokenizer", "gpt2": "PreTrainedTokenizerFast"}
    ids = {key: facts.get(f"{name}_token_id") for key, name in names.items()}
    found = {key: facts["tokens"][i] for key, i in ids.items() if i is not None}
    found |= {
        "tokenizer_class": classes[facts["model"]],
        "add_bos_token": _adds_bos(facts),
        "add_eos_token": bool(facts.get("add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
    }
    return found | ({} if chat_template is None else {"chat_template": chat_template})


def _sentencepiece(facts: Mapping[str, Any]) -> bytes:
    """Build a SentencePiece BPE model of the same pieces, scores and types; GGUF has its numbers.

    Llama's normalization: none, but for a space put before the text.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    pieces = zip(facts["tokens"], facts["scores"], facts["token_type"], strict=True)
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=float(score), type=int(kind))
    trainer = model.trainer_spec
    trainer.model_type = proto.TrainerSpec.BPE
    trainer.vocab_size = len(model.pieces)
    trainer.byte_fallback = _BYTE in facts["token_type"]
    trainer.unk_id = int(facts.get("unknown_token_id", 0))
    trainer.bos_id = int(facts.get("bos_token_id", 1))
    trainer.eos_id = int(facts.get("eos_token_id", 2))
    trainer.pad_id = -1
    trainer.unk_piece = facts["tokens"][trainer.unk_id]
    trainer.bos_piece = facts["tokens"][trainer.bos_id]
    trainer.eos_piece = facts["tokens"][trainer.eos_id]
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(facts.get("add_space_prefix", True))
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString()


def _byte_level(facts: Mapping[str, Any]) -> bytes:
    """Build a `tokenizer.json` of the same vocabulary and merges."""
    from tokenizers import models, pre_tokenizers

    from llamajax.tokenizers.tokenizer_export import begin_with, byte_level, split_into_words

    vocab = {token: i for i, token in enumerate(facts["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in facts["merges"]]
    llama3, words = facts["pre"] in _LLAMA3_NAMES, []
    if llama3:
        words = [split_into_words()]
    elif facts["pre"] == "smollm":
        words = [pre_tokenizers.Digits(individual_digits=True)]
    kinds = zip(facts["tokens"], facts["token_type"], strict=True)
    added = [(name, kind == _CONTROL) for name, kind in kinds if kind in (_CONTROL, _USER_DEFINED)]
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=llama3)
    tokenizer = byte_level(model, words, added, use_regex=not llama3)
    if _adds_bos(facts) and "bos_token_id" in facts:
        begin_with(tokenizer, facts["bos_token_id"])
    return tokenizer.to_str().encode("utf-8")
