"""Tokenizers of tiktoken rank files: Llama 3's."""

import base64
import binascii
import re
from pathlib import Path

from llamajax.errors import UserError
from llamajax.tokenizers.safe_cuts import LLAMA3_WORDS
from llamajax.tokenizers.special_tokens import find_special_tokens, read_facts
from llamajax.tokenizers.tokenizer import Tokenizer, fingerprint_of

_NUM_SPECIALS = 256
# Llama 3 leaves three of these without a use; from 3.1 on they have names.
_CONTROL = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>", 7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>",
    10: "<|python_tag|>",
}  # fmt: skip
# tiktoken panics on texts of many megabytes and is quadratic in the length of one word, so Llama 3
# cuts its input here. A cut changes the tokens around it: these two numbers belong to the model.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")


class TiktokenTokenizer(Tokenizer):
    """A file of base64 byte sequences and ranks: the ranks, then 256 special tokens.

    The first special token is BOS, the second EOS. Decoding restores every text.
    """

    kind = "tiktoken"
    _part_chars = _MAX_CHARS

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
        control = {name: size + i for i, name in _CONTROL.items()}
        self.special = find_special_tokens(
            path,
            self.facts,
            control,
            own=(size, size + 1),
            added={name: (i, True) for name, i in control.items()},
        )
        self.fingerprint = fingerprint_of(self.kind, content, self.special)
        self._encoding = tiktoken.Encoding(
            name=path.name, pat_str=LLAMA3_WORDS, mergeable_ranks=self.ranks, special_tokens={}
        )

    def safe_cut(self, text: str, at: int) -> int | None:
        cut = -(-at // _MAX_CHARS) * _MAX_CHARS
        return cut if cut < len(text) else None

    def _encode(self, text: str) -> list[int]:
        pieces = cut_long_runs(text, _MAX_RUN)
        return [i for piece in pieces for i in self._encoding.encode_ordinary(piece)]

    def _size(self, token: int) -> int:
        return len(self._encoding.decode_single_token_bytes(token))

    def _decode(self, ids: list[int]) -> str:
        known = [i for i in ids if i < len(self.ranks)]
        return self._encoding.decode_bytes(known).decode("utf-8", "replace")


def cut_long_runs(text: str, size: int) -> list[str]:
    """Cut a text so that no run of spaces, or of non-spaces, exceeds `size` characters.

    A longer run holds a multiple of `size`, so that only the runs there are looked at.
    """
    cuts, end = [0], 0
    for at in range(0, len(text), size):
        if at >= end:
            before = _RUN.match(text[max(0, at - size + 1) : at + 1][::-1]).end()
            end = _RUN.match(text, at).end()
            cuts += range(at + 1 - before + size, end, size)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
