"""Control tokens of a `tokenizer.json`: which end a document, and how no text spells any.

The tokenizer itself is in `tokenizers.py`.
"""

import json
from pathlib import Path
from typing import Any

from llamajax.errors import UserError

_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>")
_EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|im_end|>")


def without_control(spec: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The tokenizer.json with its control tokens made unreachable by any text, ids unchanged.

    They leave the list of added tokens (which is matched in the text before anything else), and
    those that also stand in the model's vocabulary get a name that no text can spell.
    """
    model = dict(spec["model"])
    keep = {model.get("unk_token")}
    hidden = {name: f"\ufdd0control:{i}\ufdd1" for i, name in enumerate(sorted(names - keep))}
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {hidden.get(piece, piece): i for piece, i in vocab.items()}
    else:  # Unigram: a list of [piece, score]
        unk = model.get("unk_id")
        model["vocab"] = [
            [piece if i == unk else hidden.get(piece, piece), score]
            for i, (piece, score) in enumerate(vocab)
        ]
    if "merges" in model:
        pairs = [(m, m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        model["merges"] = [m for m, pair in pairs if "".join(pair) not in hidden]
    return spec | {
        "model": model,
        "added_tokens": [],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def find_ends(
    path: Path, spec: dict[str, Any], config: Path, vocab: dict[str, int]
) -> tuple[int, int]:
    """BOS and EOS: from tokenizer_config.json, else the post-processor, else well-known names."""
    bos, eos = _ends_of_config(config)
    if bos not in vocab and eos not in vocab:
        bos, eos = _ends_of_template(spec.get("post_processor"))
    added = {t["content"] for t in spec.get("added_tokens") or []}
    if bos not in vocab and eos not in vocab:
        bos = next((n for n in _BOS_NAMES if n in added), None)
        eos = next((n for n in _EOS_NAMES if n in added), None)
    bos, eos = (bos if bos in vocab else eos), (eos if eos in vocab else bos)
    if bos is None or eos is None or bos not in vocab or eos not in vocab:
        raise UserError(
            f"{path}: no BOS or EOS token found, and every document is put between the two. Name "
            f"them as bos_token and eos_token in {config}. "
            f"Its control tokens: {', '.join(sorted(added)[:20]) or 'none'}"
        )
    return vocab[bos], vocab[eos]


def _ends_of_config(config: Path) -> tuple[str | None, str | None]:
    if not config.is_file():
        return None, None
    try:
        settings = json.loads(config.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{config}: not valid JSON ({error})") from error
    values = [settings.get(k) for k in ("bos_token", "eos_token")]
    bos, eos = (v.get("content") if isinstance(v, dict) else v for v in values)
    return bos, eos


def _ends_of_template(processor: dict[str, Any] | None) -> tuple[str | None, str | None]:
    if not processor:
        return None, None
    if processor.get("type") == "Sequence":
        found = [_ends_of_template(p) for p in processor.get("processors", [])]
        return next((f for f in found if any(f)), (None, None))
    single = processor.get("single")
    if not isinstance(single, list) or not single:
        return None, None
    bos, eos = (end.get("SpecialToken", {}).get("id") for end in (single[0], single[-1]))
    return bos, eos
