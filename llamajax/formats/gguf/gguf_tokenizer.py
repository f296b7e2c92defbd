"""Convert the tokenizer in a GGUF file's metadata to files that `load_tokenizer` reads, and back.

`tokenizer.ggml.model` "llama" is a SentencePiece model taken apart: it is put together again.
"gpt2" is a byte-level BPE. `tokenizer.ggml.pre` only names how it splits text into words before
merging, so an unknown name gives no tokenizer. What is written, as llama.cpp's converter does, is
read back, and left out with a warning unless it makes the same tokens of sample texts.
"""

import atexit
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.formats.foreign_weights import note
from llamajax.formats.gguf.gguf_header import GgufHeader
from llamajax.tokenizers import Tokenizer, load_tokenizer
from llamajax.tokenizers.tokenizer_identity import same_tokens

_KEY = "tokenizer.ggml."
# Types of tokens, SentencePiece's own numbers.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_PRE = (*_LLAMA3_NAMES, "smollm", "gpt-2")
_WRITTEN_PRE = ("llama-bpe", "smollm", "gpt-2")  # the first that fits is written
_ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>")
# Digits, letters that a normalizer would change, spaces: what the kinds of tokenizers differ in.
_SAMPLES = (
    "1234567 89",
    "e\u0301 \ufb01 \u212b",
    " a  b\n\n\tc\u00a0d",
    "it's IT'S \u00e9t\u00e9 \U0001f600",
)


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


def tokenizer_metadata(
    tokenizer: Tokenizer | None, vocab_size: int, path: Path
) -> tuple[dict[str, Any], list[str]]:
    """Return the keys `tokenizer.*` of a model with so many rows, and warnings. path: the file."""
    none = {f"{_KEY}model": "no_vocab"}
    if tokenizer is None:
        return none, []
    from llamajax.tokenizers.tokenizer_export import export_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        export_tokenizer(tokenizer, Path(folder))
        file = Path(folder) / "tokenizer.json"
        spec = json.loads(file.read_text("utf-8")) if file.is_file() else {"model": {}}
    pieces = spec["model"].get("byte_fallback", False)
    for pre in (
        (("default",) if pieces else _WRITTEN_PRE) if spec["model"].get("type") == "BPE" else ()
    ):
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
