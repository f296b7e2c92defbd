"""Tokenizers of tiktoken rank files: Llama 3's."""

import base64
import binascii
import re
from pathlib import Path

from llamajax.errors import UserError
from llamajax.tokenizers.special_tokens import find_ends, read_facts
from llamajax.tokenizers.tokenizer import Tokenizer, fingerprint_of

# How Llama 3 splits a text into words before it merges; its ranks depend on it.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NUM_SPECIALS = 256
_CONTROL = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 9: "<|eot_id|>",
}  # fmt: skip
# tiktoken panics on texts of many megabytes and is quadratic in the length of one word, so Llama 3
# cuts its input here. A cut changes the tokens around it: these two numbers belong to the model.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000


class TiktokenTokenizer(Tokenizer):
    """A file of base64 byte sequences and ranks: the ranks, then 256 special tokens.

    The first special token is BOS, the second EOS. Decoding restores every text.
    """

    kind = "tiktoken"

    def __init__(self, path: Path) -> None:
        import tiktoken

        content = path.read_bytes()
        self.ranks: dict[bytes, int] = {}
        for number, line in enumerate(content.splitlines(), 1):
            try:
                token, rank = line.split()
                self.ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise UserError(
                    f"{path}:{number}: not a line of base64 token and rank: the file is damaged"
                ) from None
        size = len(self.ranks)
        complete = sorted(self.ranks.values()) == list(range(size))
        if not complete or any(bytes([b]) not in self.ranks for b in range(256)):
            raise UserError(f"{path}: ranks are not 0..{size - 1} over all 256 bytes: damaged file")
        self.file = path
        self.vocab_size = size + _NUM_SPECIALS
        self.facts = read_facts(path)
        self.control_ids = {name: size + i for i, name in _CONTROL.items()}
        self.bos_id, self.eos_id, _ = find_ends(
            path, self.facts, self.control_ids, own=(size, size + 1), added=()
        )
        self.fingerprint = fingerprint_of(self.kind, content, self.bos_id, self.eos_id)
        self._encoding = tiktoken.Encoding(
            name=path.name, pat_str=LLAMA3_WORDS, mergeable_ranks=self.ranks, special_tokens={}
        )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for start in range(0, len(text), _MAX_CHARS):
            for piece in cut_long_runs(text[start : start + _MAX_CHARS], _MAX_RUN):
                ids += self._encoding.encode_ordinary(piece)
        return ids

    def _decode(self, ids: list[int]) -> str:
        known = [i for i in ids if i < len(self.ranks)]
        return self._encoding.decode_bytes(known).decode("utf-8", "replace")


def cut_long_runs(text: str, size: int) -> list[str]:
    """Cut a text so that no run of spaces, or of non-spaces, exceeds `size` characters."""
    if len(text) <= size:
        return [text]
    cuts = [0]
    for run in re.finditer(r"\s+|\S+", text):
        cuts += range(run.start() + size, run.end(), size)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
