"""Tokenizers of SentencePiece models: Llama 2's, and those that `train:N` makes."""

import dataclasses
import itertools
import re
from pathlib import Path

from llamajax.errors import UserError
from llamajax.tokenizers.special_tokens import (
    divide_added,
    find_ends,
    foreign_tokens,
    num_used,
    read_facts,
)
from llamajax.tokenizers.tokenizer import Tokenizer, fingerprint_of


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, and the tokens that files beside it add.

    Decoding restores a text if the model has byte fallback and does not normalize, as Llama 2's.
    The exception is U+2581, which SentencePiece uses for spaces: it comes back as a space.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        content = path.read_bytes()
        try:
            if not content:  # SentencePiece would load it as an empty model
                raise OSError("empty file")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{path}: neither a SentencePiece model nor a tiktoken rank file"
            ) from error
        self.file = path
        self.facts = facts = read_facts(path)
        size = self._model.vocab_size()
        pieces = {self._model.id_to_piece(i): i for i in range(size)}
        added = {name: i for name, (i, _) in facts.added.items() if i >= size}
        self.vocab_size = num_used(pieces | added)
        if sorted(added.values()) != list(range(size, size + len(added))):
            raise foreign_tokens(path, added.values(), size)
        own = tuple(i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id()))
        if own[0] is None:
            facts = dataclasses.replace(facts, named={"bos_token": None, **facts.named})
        self.bos_id, self.eos_id, self.warnings = find_ends(
            path, facts, pieces | added, own=own, added=added
        )
        added = {name: facts.added[name] for name in added}
        control, self.added_ids = divide_added(added, (self.bos_id, self.eos_id))
        own_control = {name: i for name, i in pieces.items() if self._model.is_control(i)}
        self.control_ids = own_control | control
        self._added_names = {i: name for name, i in self.added_ids.items()}
        longest_first = sorted(self.added_ids, reverse=True)
        self._splitter = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.fingerprint = fingerprint_of(
            self.kind, content, self.bos_id, self.eos_id, self.added_ids
        )
        if (back := self._model.decode(self._model.encode("a\nb"))) != "a\nb":
            self.warnings += (
                f"{path}: this model loses newlines ('a\\nb' comes back as {back!r}): it "
                "normalizes white space, or has no byte fallback; no line ends can be learned",
            )
        self._line_start = self._tokens_before_a_line()
        if self._line_start:
            self._after_newline = self._line_start + 1

    def _tokens_before_a_line(self) -> int | None:
        """Count the tokens that encoding adds before a line; None if lines are not independent.

        No piece of Llama 2 contains a newline. Lines can then be encoded one by one, with the same
        tokens: three times faster than a whole book.
        """
        encode = self._model.encode
        if not self._model.is_byte((encode("\n") or [self._model.unk_id()])[-1]):
            return None  # a newline is part of a word, or lost
        if any("\n" in self._model.id_to_piece(i) for i in range(self._model.vocab_size())):
            return None
        extra = len(encode("\n")) - 1
        for left, right in (("a", "\nb"), ("a  ", "\n  b"), ("\n", "\n\n "), ("a\r", "\n<s>")):
            if encode(left) + encode(right)[extra:] != encode(left + right):
                return None
        return extra

    def _encode(self, text: str) -> list[int]:
        if not self.added_ids:
            return self._encode_pieces(text)
        ids: list[int] = []
        for part in self._splitter.split(text):
            if part in self.added_ids:
                ids.append(self.added_ids[part])
            elif ids and part and self._after_newline:  # no space before what follows a token
                ids += self._encode_pieces("\n" + part)[self._after_newline :]
            else:
                ids += self._encode_pieces(part)
        return ids

    def _encode_pieces(self, text: str) -> list[int]:
        if self._line_start is None or len(text) < 2000:
            return self._model.encode(text)
        ids: list[int] = []
        start = 0
        while start < len(text):
            end = text.find("\n", start + 1000)
            end = len(text) if end < 0 else end
            ids += self._model.encode(text[start:end])[self._line_start if start else 0 :]
            start = end
        return ids

    def _decode(self, ids: list[int]) -> str:
        """Decode each run of pieces and the added tokens between them.

        SentencePiece drops the space before a text. Only the first run starts one, so the others
        are decoded after the piece "a".
        """
        size, text = self._model.vocab_size(), ""
        for is_piece, run in itertools.groupby(ids, lambda i: i < size):
            if not is_piece:
                text += "".join(self._added_names.get(i, "") for i in run)
            elif text:
                text += self._model.decode([*self._model.encode("a"), *run])[1:]
            else:
                text = self._model.decode(list(run))
        return text
