"""Tokenizers of SentencePiece models: Llama 2's, and those that `train:N` makes."""

import dataclasses
import itertools
import re
from pathlib import Path

from llamajax.errors import UserError
from llamajax.tokenizers.safe_cuts import FindCut, cut_at, cut_between
from llamajax.tokenizers.special_tokens import (
    find_special_tokens,
    foreign_tokens,
    num_used,
    read_facts,
)
from llamajax.tokenizers.tokenizer import Tokenizer, any_of, fingerprint_of

_LINES = re.compile(r"(?=\n)")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, and the tokens that files beside it add.

    Decoding restores a text if the model has byte fallback and does not normalize, as Llama 2's.
    The exception is U+2581, which SentencePiece uses for spaces: it comes back as a space.
    """

    kind = "sentencepiece"
    _part_chars = 600

    def __init__(self, path: Path) -> None:
        import sentencepiece

        content = path.read_bytes()
        try:
            if not content:  # SentencePiece would load it as an empty model
                raise OSError("empty file")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            size = self._model.vocab_size()
            pieces = {self._model.id_to_piece(i): i for i in range(size)}
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}: neither a SentencePiece model nor a tiktoken rank file, or damaged"
            ) from error
        self.file = path
        self.facts = facts = read_facts(path)
        added = {name: fact for name, fact in facts.added.items() if fact[0] >= size}
        ids = {name: i for name, (i, _) in added.items()}
        self.vocab_size = num_used(pieces | ids)
        if sorted(ids.values()) != list(range(size, size + len(ids))):
            raise foreign_tokens(path, ids.values(), size)
        own = tuple(i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id()))
        if own[0] is None:
            facts = dataclasses.replace(facts, named={"bos_token": None, **facts.named})
        special = find_special_tokens(path, facts, pieces | ids, own=own, added=added)
        control = {name: i for name, i in pieces.items() if self._model.is_control(i)}
        warnings = special.warnings
        if (back := self._model.decode(self._model.encode("a\nb"))) != "a\nb":
            warnings += (
                f"{path}: this model loses newlines ('a\\nb' comes back as {back!r}): it "
                "normalizes white space, or has no byte fallback; no line ends can be learned",
            )
        self.special = dataclasses.replace(
            special, control_ids=control | dict(special.control_ids), warnings=warnings
        )
        self._splitter = any_of(self.added_ids)
        self.fingerprint = fingerprint_of(self.kind, content, self.special)
        before = self._tokens_before_a_line()
        self._after_newline = before + 1 if before else 0
        self._find_cut = None if before is None else self._cuts(content)

    def _tokens_before_a_line(self) -> int | None:
        """Count the tokens that encoding adds before a line; None if lines are not independent."""
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

    def _cuts(self, content: bytes) -> FindCut:
        """Return where texts can be cut: for Llama 2's kind of model also within lines.

        Parts of 1,000 characters are encoded three times as fast as a whole book.
        """
        from sentencepiece import sentencepiece_model_pb2 as proto

        model = proto.ModelProto.FromString(content)
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        changes = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
        is_plain = normalizer.escape_whitespaces and not trainer.treat_whitespace_as_suffix
        kinds = proto.ModelProto.SentencePiece
        if trainer.model_type != proto.TrainerSpec.BPE or changes or not is_plain:
            return cut_at(_LINES)
        spelled = (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)
        return cut_between((p.piece for p in model.pieces if p.type in spelled), self.added_ids)

    def safe_cut(self, text: str, at: int) -> int | None:
        return self._find_cut and self._find_cut(text, at)

    def _encode(self, text: str) -> list[int]:
        if not self.added_ids:
            return self._model.encode(text)
        ids: list[int] = []
        for part in self._splitter.split(text):
            if part in self.added_ids:
                ids.append(self.added_ids[part])
            elif ids and part and self._after_newline:  # no space before what follows a token
                ids += self._model.encode("\n" + part)[self._after_newline :]
            else:
                ids += self._model.encode(part)
        return ids

    def _decode(self, ids: list[int]) -> str:
        """Decode each run of pieces and the added tokens between them.

        SentencePiece drops the space before a text. Only the first run starts one, so the others
        are decoded after the piece "a".
        """
        size, text = self._model.vocab_size(), ""
        names = {i: name for name, i in self.added_ids.items()}
        for is_piece, run in itertools.groupby(ids, lambda i: i < size):
            if not is_piece:
                text += "".join(names.get(i, "") for i in run)
            elif text:
                text += self._model.decode([*self._model.encode("a"), *run])[1:]
            else:
                text = self._model.decode(list(run))
        return text
