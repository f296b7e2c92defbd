"""Control tokens of a `tokenizer.json`: which it puts around a text, and how no text spells any.

The tokenizer itself is in `tokenizers.py`.
"""

from typing import Any


def without_control(spec: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The tokenizer.json with its control tokens made unreachable by any text.

    They leave the list of added tokens (which is matched in the text before anything else), and
    those that also stand in the model's vocabulary get a name that no text can spell. The library
    numbers the added tokens that are left anew, unless they stand in the vocabulary.
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
        "added_tokens": [t for t in spec.get("added_tokens") or [] if t["content"] not in names],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def ends_of_template(processor: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """Names of the tokens that the post-processor puts before and after a text."""
    if not processor:
        return None, None
    if processor.get("type") == "Sequence":
        found = [ends_of_template(p) for p in processor.get("processors", [])]
        return next((f for f in found if any(f)), (None, None))
    single = processor.get("single")
    if not isinstance(single, list) or not single:
        return None, None
    bos, eos = (end.get("SpecialToken", {}).get("id") for end in (single[0], single[-1]))
    return bos, eos
