"""The interface of all tokenizers, and the simplest of them: bytes."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from llamajax.errors import UserError
from llamajax.tokenizers.special_tokens import (
    SpecialTokens,
    TokenFacts,
    copy_companions,
    read_facts,
)


class Tokenizer:
    """Text to token ids and back. `encode` returns ordinary tokens only, whatever a text contains.

    Callers add BOS and EOS, since they know where a document starts and ends.
    """

    kind: str
    vocab_size: int
    special: SpecialTokens
    fingerprint: str  # sha256 of all that decides about encoding and decoding
    facts: TokenFacts = TokenFacts()
    file: Path | None = None
    # Texts are encoded in parts of about so many characters, where `safe_cut` finds cuts.
    _part_chars = 50_000
    # Of a model that puts a space before texts: number of tokens of "\n" at the start of a text.
    _after_newline = 0

    @property
    def bos_id(self) -> int | None:
        """The token that begins texts, None if there is none; `start_ids` says whether it does."""
        return self.special.bos_id

    @property
    def eos_id(self) -> int:
        """The token after texts."""
        return self.special.eos_id

    @property
    def control_ids(self) -> Mapping[str, int]:
        """Control tokens by name; no text encodes to them."""
        return self.special.control_ids

    @property
    def added_ids(self) -> Mapping[str, int]:
        """Ordinary added tokens by name."""
        return self.special.added_ids

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user of this tokenizer should know."""
        return self.special.warnings

    @property
    def start_ids(self) -> list[int]:
        """The tokens before a text: BOS, or none (no BOS, or `add_bos_token: false`)."""
        return [self.bos_id] if self.special.adds_bos and self.bos_id is not None else []

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All tokens that end generation: the EOS ids that the model states, else `eos_id`."""
        return self.facts.model.eos_ids or (self.eos_id,)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without BOS and EOS. Control tokens in it are text."""
        return self.encode_array(text).tolist()

    def encode_continuation(self, text: str) -> list[int]:
        """Return the tokens of a text that follows another: no space is put before it.

        `decode(encode(a) + encode_continuation(b))` is a + b.
        """
        return self.encode_array(text, continues=True).tolist()

    def encode_array(self, text: str, *, continues: bool = False) -> np.ndarray:
        """Return the tokens of a text, or of one that follows another, as uint32."""
        parts = []
        for part in self._parts(well_formed(text)):
            drop = self._after_newline if continues else 0
            ids = self._encode("\n" + part if drop else part)
            parts.append(np.asarray(ids, np.uint32)[drop:])
            continues = True
        return np.concatenate(parts)

    def safe_cut(self, text: str, at: int) -> int | None:
        """Return the first place from `at` on where `text` may be cut; None if there is none.

        The text before it and its continuation from there have the tokens that the whole has.
        """
        return None

    def encode_rendered(self, text: str, *, as_text: str) -> list[int]:
        """Return the tokens of a rendered chat template: names of control tokens are those tokens.

        as_text: a character that stands within names that are text, and is left out.
        """
        ids: list[int] = []
        for part in any_of(self.control_ids).split(text):
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

    def token_bytes(self, tokens: Iterable[int]) -> np.ndarray:
        """Return the bytes that each token adds to a text, int64; 0 for those not in `tokens`."""
        sizes, before = np.zeros(self.vocab_size, np.int64), self.encode("a")
        known = len(self.decode(before))
        for token in tokens:
            text = self.decode([*before, token])[known:]
            broken = "\ufffd" in text  # what a part of a character decodes to
            sizes[token] = self._size(token) if broken else len(text.encode("utf-8", "replace"))
        return sizes

    def _size(self, token: int) -> int:
        """Return the bytes of a token with a part of a character: one, unless tokens merge more."""
        return 1

    def save(self, directory: Path) -> str:
        """Copy the tokenizer into `directory`; return the file name for `load_tokenizer`."""
        name = "tokenizer.json" if self.kind == "huggingface" else "tokenizer.model"
        shutil.copyfile(self.file, directory / name)
        copy_companions(self.file, directory)
        return name

    def _parts(self, text: str) -> Iterator[str]:
        """Cut a text where that changes no token; at least one part."""
        start = 0
        while len(text) - start > self._part_chars:
            end = self.safe_cut(text, start + self._part_chars)
            if end is None:
                break
            yield text[start:end]
            start = end
        yield text[start:] if start else text

    def _encode(self, text: str) -> Sequence[int] | np.ndarray:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern, one group, that matches each of the names, the longest first."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def fingerprint_of(kind: str, content: bytes, special: SpecialTokens) -> str:
    """Return the hash of a tokenizer's file and of the other facts that its ids depend on."""
    facts = [kind, special.bos_id if special.adds_bos else None, special.eos_id]
    facts += [special.added_ids] if special.added_ids else []
    head = json.dumps(facts).encode() + b"\n"
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
    vocab_size = 258
    special = SpecialTokens(bos_id=256, eos_id=257, control_ids={"<s>": 256, "</s>": 257})
    # Of its vocabulary, BOS and EOS, as in data that was prepared before.
    fingerprint = hashlib.sha256(b'["byte", 258, 256, 257]\n').hexdigest()

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.facts = TokenFacts() if file is None else read_facts(file)

    def safe_cut(self, text: str, at: int) -> int | None:
        return at if at < len(text) else None

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def _decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def save(self, directory: Path) -> str:
        (directory / "tokenizer.byte").write_text("llamajax byte tokenizer: 256 bytes, BOS, EOS\n")
        if self.file is not None:
            copy_companions(self.file, directory)
        return "tokenizer.byte"
