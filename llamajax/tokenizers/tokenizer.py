"""The interface of all tokenizers, and the simplest of them: bytes."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llamajax.errors import UserError
from llamajax.tokenizers.special_tokens import TokenFacts, copy_companions, read_facts


class Tokenizer:
    """Text to token ids and back. `encode` returns ordinary tokens only, whatever a text contains.

    Callers add BOS and EOS, since they know where a document starts and ends.
    """

    kind: str
    vocab_size: int
    bos_id: int | None  # None: texts begin without one
    eos_id: int
    fingerprint: str  # sha256 of all that decides about encoding and decoding
    facts: TokenFacts = TokenFacts()
    warnings: tuple[str, ...] = ()
    control_ids: Mapping[str, int] = MappingProxyType({})  # by name; no text encodes to them
    added_ids: Mapping[str, int] = MappingProxyType({})  # by name, of ordinary added tokens
    file: Path | None = None
    # Of a model that puts a space before texts: number of tokens of "\n" at the start of a text.
    _after_newline = 0

    @property
    def start_ids(self) -> list[int]:
        """The tokens before a text: BOS, or none."""
        return [] if self.bos_id is None else [self.bos_id]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All tokens that end generation: the EOS ids that the model states, else `eos_id`."""
        return self.facts.model.eos_ids or (self.eos_id,)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without BOS and EOS. Control tokens in it are text."""
        return self._encode(well_formed(text))

    def encode_continuation(self, text: str) -> list[int]:
        """Return the tokens of a text that follows another: no space is put before it.

        `decode(encode(a) + encode_continuation(b))` is a + b.
        """
        if not self._after_newline:
            return self.encode(text)
        return self.encode("\n" + text)[self._after_newline :]

    def encode_rendered(self, text: str, *, as_text: str) -> list[int]:
        """Return the tokens of a rendered chat template: names of control tokens are those tokens.

        as_text: a character that stands within names that are text, and is left out.
        """
        names = sorted(self.control_ids, key=len, reverse=True)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]:
            if part in self.control_ids:
                ids.append(self.control_ids[part])
            elif part := part.replace(as_text, ""):
                starts = not ids or ids[-1] == self.bos_id
                ids += self.encode(part) if starts else self.encode_continuation(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens. Control tokens have none; broken UTF-8 becomes U+FFFD."""
        ids = [int(i) for i in ids]
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise UserError(
                f"token id {bad[0]} is outside the tokenizer's 0..{self.vocab_size - 1}"
            )
        return self._decode(ids)

    def save(self, directory: Path) -> str:
        """Copy the tokenizer into `directory`; return the file name for `load_tokenizer`."""
        name = "tokenizer.json" if self.kind == "huggingface" else "tokenizer.model"
        shutil.copyfile(self.file, directory / name)
        copy_companions(self.file, directory)
        return name

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError


def fingerprint_of(kind: str, content: bytes, *facts: Any) -> str:
    """Return the hash of a tokenizer's file and of the other facts that its ids depend on.

    An empty dict, of no added tokens, counts for nothing.
    """
    head = json.dumps([kind, *(fact for fact in facts if fact != {})]).encode() + b"\n"
    return hashlib.sha256(head + content).hexdigest()


def well_formed(text: str) -> str:
    """Replace half surrogates (from broken JSON escapes) by U+FFFD: they have no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class ByteTokenizer(Tokenizer):
    """The 256 byte values, then BOS 256 and EOS 257. Decoding restores every text."""

    kind = "byte"
    vocab_size, bos_id, eos_id = 258, 256, 257
    control_ids = MappingProxyType({"<s>": 256, "</s>": 257})
    fingerprint = fingerprint_of("byte", b"", 258, 256, 257)

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.facts = TokenFacts() if file is None else read_facts(file)

    def _encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def _decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def save(self, directory: Path) -> str:
        (directory / "tokenizer.byte").write_text("llamajax byte tokenizer: 256 bytes, BOS, EOS\n")
        if self.file is not None:
            copy_companions(self.file, directory)
        return "tokenizer.byte"
