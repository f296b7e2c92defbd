"""Byte-level BPE: the letters that stand for bytes, and when tiktoken makes the same ids."""

import functools
import itertools
import unicodedata
from collections.abc import Mapping
from typing import Any

from llamajax.tokenizers.safe_cuts import LLAMA3_WORDS, is_split_by

_SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [b for b in range(256) if b not in _SHOWN]
# The printable character for each byte in a byte-level vocabulary (GPT-2's).
_LETTER = {b: chr(b) for b in _SHOWN} | {b: chr(256 + n) for n, b in enumerate(_HIDDEN)}
BYTE_LETTERS = [_LETTER[b] for b in range(256)]


def proven_encoding(spec: Mapping[str, Any]) -> Any:
    """Return a tiktoken encoding with the ids of a tokenizer.json; None where that is not proven.

    Both take a whole word if it is a token, and else merge two neighbors again and again: tiktoken
    those that give the lowest id, the leftmost first; tokenizers those that stand first among the
    merges, the leftmost first. The order is the same if the merges are all pairs of tokens that
    give a token, in the order of these: pairs that give the same token never compete, since the
    bytes of a token are always merged in the same steps, and the last joins one pair.
    """
    import tiktoken

    model = spec["model"]
    affixes = (model.get(k) for k in ("continuing_subword_prefix", "end_of_word_suffix"))
    is_plain = model.get("type") == "BPE" and model.get("ignore_merges") is True
    changes = model.get("dropout") or model.get("byte_fallback") or any(affixes)
    if not is_plain or changes or spec.get("added_tokens") or not is_split_by(spec, LLAMA3_WORDS):
        return None
    vocab, letters = model["vocab"], {letter: b for b, letter in enumerate(BYTE_LETTERS)}
    ids = {piece: i for piece, i in vocab.items() if letters.keys() >= set(piece)}
    if not letters.keys() <= ids.keys() or len(set(ids.values())) != len(ids):
        return None
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    made = [ids.get(left + right, -1) for left, right in pairs]
    halves = sum(
        piece[:cut] in ids and piece[cut:] in ids for piece in ids for cut in range(1, len(piece))
    )
    in_order = all(a <= b for a, b in itertools.pairwise(made))
    are_tokens = all(left in ids and right in ids for left, right in pairs)
    if -1 in made or not in_order or not are_tokens or not len(set(pairs)) == len(pairs) == halves:
        return None
    if not _engines_agree():
        return None
    ranks = {bytes(letters[letter] for letter in piece): i for piece, i in ids.items()}
    return tiktoken.Encoding(
        "proven", pat_str=LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens={}
    )


@functools.cache
def _engines_agree() -> bool:
    """Return whether both libraries know the same characters as letters, numbers and spaces.

    Their regular expressions come from two engines, each with its own edition of Unicode. So the
    characters that Unicode 3.2 did not have are compared, as far as planes are in use.
    """
    import tiktoken
    import tokenizers

    category = unicodedata.ucd_3_2_0.category
    text = "".join(c for c in map(chr, range(0x40000)) if category(c) == "Cn")
    ranks = {bytes([b]): b for b in range(256)}
    for kind in (r"\p{L}", r"\p{N}", r"\s"):
        one = tiktoken.Encoding(
            "kind", pat_str=kind, mergeable_ranks=ranks, special_tokens={}
        ).encode_ordinary(text)
        other = tokenizers.pre_tokenizers.Split(
            tokenizers.Regex(f"{kind}+"), behavior="removed", invert=True
        ).pre_tokenize_str(text)
        if bytes(one) != "".join(run for run, _ in other).encode():
            return False
    return True
