"""The interface of a tokenizer. The kinds that implement it are in `tokenizers.py`."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llamajax.errors import UserError
from llamajax.tokenizers.special_tokens import Facts, carry_companions


class Tokenizer:
    """Text to token ids and back; `fingerprint` is a sha256 of all that decides about both.

    Half surrogates in a text (a broken JSON escape) become U+FFFD: no tokenizer can encode them.
    """

    kind: str
    vocab_size: int
    bos_id: int | None  # None: texts begin without one
    eos_id: int
    fingerprint: str
    facts: Facts = Facts()
    warnings: tuple[str, ...] = ()
    control_ids: Mapping[str, int] = MappingProxyType({})  # by name; no text encodes to them
    added_ids: Mapping[str, int] = MappingProxyType({})  # by name, of ordinary added tokens
    files: tuple[Path, ...] = ()
    # Number of tokens of a newline that starts a text, where a space is put before texts.
    _after_newline: int | None = None

    @property
    def start_ids(self) -> list[int]:
        """What stands before a text: BOS, or nothing."""
        return [] if self.bos_id is None else [self.bos_id]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All tokens that end what the model writes: its own list of EOS, else the text's EOS."""
        return self.facts.eos_ids or (self.eos_id,)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text: no BOS, no EOS; what looks like a control token is encoded as text."""
        return self._encode(well_formed(text))

    def encode_continuation(self, text: str) -> list[int]:
        """Tokens of a text that follows others: without the space that SentencePiece models put
        before a text, so that `encode(a) + encode_continuation(b)` reads as a + b."""
        if not self._after_newline:
            return self.encode(text)
        return self.encode("\n" + text)[self._after_newline :]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens; control tokens give nothing, broken UTF-8 gives U+FFFD."""
        ids = [int(i) for i in ids]
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise UserError(
                f"token id {bad[0]} is outside the tokenizer's 0..{self.vocab_size - 1}"
            )
        return self._decode(ids)

    def save(self, directory: Path) -> str:
        """Name of the file, in `directory`, from which `load_tokenizer` makes this tokenizer."""
        name = "tokenizer.json" if self.kind == "huggingface" else "tokenizer.model"
        for file in self.files:
            shutil.copyfile(file, directory / name)
            carry_companions(file, directory)
        return name

    def export(self, directory: Path) -> list[str]:
        """Write the files from which transformers makes this tokenizer; returns warnings."""
        from llamajax.tokenizers.export import export

        return export(self, directory)

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError


def fingerprint_of(kind: str, content: bytes, *facts: Any) -> str:
    """Hash of a tokenizer's file and of the facts that its ids depend on besides."""
    head = json.dumps([kind, *facts]).encode() + b"\n"
    return hashlib.sha256(head + content).hexdigest()


def well_formed(text: str) -> str:
    """The text with U+FFFD for half surrogates (a broken JSON escape), which have no UTF-8."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
