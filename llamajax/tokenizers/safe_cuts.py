"""Places where a text can be cut so that no token changes, for each kind of tokenizer.

Long texts are encoded in parts: in a bounded memory, and by several processes.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# Returns the first safe place in a text from an index on, None if there is none.
FindCut = Callable[[str, int], int | None]

_SPACE = "\u2581"  # SentencePiece's
# How byte-level tokenizers split a text into words before they merge: Llama 3's way. Qwen 2 takes
# digits one by one.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = (LLAMA3_WORDS, LLAMA3_WORDS.replace("{1,3}", ""))
# No word of these goes on after a character with a space, and none from a newline to a letter. What
# comes before such a place does not look beyond it either: only `\s+(?!\S)` looks ahead, and a run
# of spaces that ends in a newline is taken by `\s*[\r\n]+` first.
_WORD_ENDS = re.compile(r"(?<=[!-~\w])(?= )|(?<=\n)(?=[!-~\w])")
# GPT 2's words, built into the library: there a newline may belong to the word before or after.
_GPT2_WORD_ENDS = re.compile(r"(?<=[!-~\w])(?= )")
_DIGITS = {"type": "Digits", "individual_digits": True}
# The normalizer of Llama 2's tokenizer.json.
_SPACES = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ],
}


def cut_between(pieces: Iterable[str], names: Iterable[str]) -> FindCut:
    """Return the cuts of a BPE that merges across words: `pieces` are all that it can make.

    A place is safe if no piece holds the two characters beside it next to each other: no merge ever
    reaches over it, so that both sides are merged as if they were alone. names: added tokens, which
    are found before anything is merged; no cut touches one.
    """
    names = [name for name in names if name]
    lasts, firsts = {name[-1] for name in names}, {name[0] for name in names}
    joined = {
        a + b
        for piece in (*pieces, *names)
        for c, d in itertools.pairwise(piece)
        for a in ((c, " ") if c == _SPACE else c)
        for b in ((d, " ") if d == _SPACE else d)
    }

    def find(text: str, at: int) -> int | None:
        for i in range(max(at, 1), len(text)):
            if (
                text[i - 1 : i + 1] not in joined
                and text[i - 1] not in lasts
                and text[i] not in firsts
            ):
                return i
        return None

    return find


def cut_at(pattern: re.Pattern[str]) -> FindCut:
    """Return the cuts where a pattern without characters matches."""

    def find(text: str, at: int) -> int | None:
        found = pattern.search(text, at)
        return found and found.start()

    return find


def is_split_by(spec: Mapping[str, Any], words: str) -> bool:
    """Return whether a tokenizer.json splits a text into `words` and changes nothing before."""
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    steps = _steps(spec)
    return steps[:1] == [split] and _are_bytes(steps[1:], use_regex=False)


def _steps(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the pre-tokenizers; none if a normalizer changes the text before."""
    step = spec.get("pre_tokenizer")
    if step is None or spec.get("normalizer") is not None:
        return []
    return step["pretokenizers"] if step["type"] == "Sequence" else [step]


def _are_bytes(steps: Sequence[Mapping[str, Any]], *, use_regex: bool) -> bool:
    """Return whether the only step is that of byte-level tokenizers, without a space before."""
    kinds = [(s["type"], s.get("add_prefix_space"), s.get("use_regex", True)) for s in steps]
    return kinds == [("ByteLevel", False, use_regex)]


def cuts_of_json(spec: Mapping[str, Any]) -> FindCut | None:
    """Return the cuts of a tokenizer.json; None where none is proven safe."""
    model, added = spec["model"], spec.get("added_tokens") or []
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    if (
        model.get("type") != "BPE"
        or model.get("dropout")
        or any(t[f] for t in added for f in flags)
    ):
        return None
    names = [token["content"] for token in added]
    if any(c.isspace() for name in names for c in name):
        return None
    if any(is_split_by(spec, words) for words in _WORDS):
        return cut_at(_WORD_ENDS)
    steps = _steps(spec)
    if _are_bytes(steps[steps[:1] == [_DIGITS] :], use_regex=True):
        return cut_at(_GPT2_WORD_ENDS)
    if spec.get("pre_tokenizer") is None and spec.get("normalizer") == _SPACES:
        vocab = model["vocab"]
        affixes = (model.get(k) for k in ("continuing_subword_prefix", "end_of_word_suffix"))
        # With all bytes nothing is unknown: unknown neighbors become one token.
        needed = (
            {_SPACE, *(f"<0x{b:02X}>" for b in range(256))} if model.get("byte_fallback") else {""}
        )
        if needed <= vocab.keys() and not any(affixes) and not any("\n" in p for p in vocab):
            return cut_between(vocab, names)
    return None
