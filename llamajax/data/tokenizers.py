"""Tokenizers behind one small interface: SentencePiece, tiktoken ranks, Hugging Face JSON, bytes.

Training a new one lives in `tokenizer_training.py`. Whatever a text contains, `encode` returns
ordinary tokens only: BOS and EOS are placed by those who know where a document starts and ends.
"""

import base64
import binascii
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from llamajax.data.tokenizer_json import find_ends, without_control
from llamajax.errors import UserError

MANIFEST = "manifest.json"

# The split of text into words that Llama 3 was trained with; its ranks mean nothing without it.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NUM_SPECIALS = 256
_LLAMA3_CONTROL = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 9: "<|eot_id|>",
}  # fmt: skip
# tiktoken panics on texts of many megabytes and is quadratic in the length of one word, so Llama 3
# cuts its input here; a cut changes the tokens around it, so these two numbers belong to the model.
_LLAMA3_MAX_CHARS = 400_000
_LLAMA3_MAX_RUN = 25_000


class Tokenizer:
    """Text to token ids and back; `fingerprint` is a sha256 of all that decides about both.

    Half surrogates in a text (a broken JSON escape) become U+FFFD: no tokenizer can encode them.
    """

    kind: str
    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str
    control_ids: Mapping[str, int] = MappingProxyType({})  # by name; no text encodes to them
    files: tuple[Path, ...] = ()
    # Number of tokens of a newline that starts a text, where a space is put before texts.
    _after_newline: int | None = None

    def encode(self, text: str) -> list[int]:
        """Tokens of a text: no BOS, no EOS; what looks like a control token is encoded as text."""
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._encode(text)

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
        for file in self.files:
            shutil.copyfile(file, directory / _stored_name(file, self.kind))
        return _stored_name(self.files[0], self.kind)

    def export(self, directory: Path) -> list[str]:
        """Write the files from which transformers makes this tokenizer; returns warnings."""
        from llamajax.data.tokenizer_export import export

        return export(self, directory)

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError


def _stored_name(file: Path, kind: str) -> str:
    if kind in ("sentencepiece", "tiktoken"):
        return "tokenizer.model"
    return file.name if file.name == "tokenizer_config.json" else "tokenizer.json"


def _fingerprint(kind: str, content: bytes, *facts: int) -> str:
    head = json.dumps([kind, *facts]).encode() + b"\n"
    return hashlib.sha256(head + content).hexdigest()


class ByteTokenizer(Tokenizer):
    """The 256 byte values, then BOS 256 and EOS 257; every text survives a round trip."""

    kind = "byte"
    vocab_size, bos_id, eos_id = 258, 256, 257
    fingerprint = _fingerprint("byte", b"", 258, 256, 257)

    def _encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def _decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def save(self, directory: Path) -> str:
        (directory / "tokenizer.byte").write_text("llamajax byte tokenizer: 256 bytes, BOS, EOS\n")
        return "tokenizer.byte"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (Llama 2, or `train:N`).

    Round trips hold for models with byte fallback and without normalisation, Llama 2's included,
    but for U+2581: SentencePiece writes a space with it, so it comes back as a space.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        content = path.read_bytes()
        try:
            if not content:  # SentencePiece takes it for a model of nothing
                raise OSError("empty file")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{path}: neither a SentencePiece model nor a tiktoken rank file"
            ) from error
        self.files = (path,)
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{path}: the model has no BOS or no EOS piece; documents need both")
        self.fingerprint = _fingerprint(self.kind, content, self.bos_id, self.eos_id)
        self.control_ids = {
            self._model.id_to_piece(i): i
            for i in range(self.vocab_size)
            if self._model.is_control(i)
        }
        self._line_start = self._tokens_before_a_line()
        if self._line_start:
            self._after_newline = self._line_start + 1

    def _tokens_before_a_line(self) -> int | None:
        """Tokens that a piece starting with a newline has too many; None if lines interact.

        No piece of Llama 2 holds a newline, so that lines can be encoded one by one: three times
        faster than a whole book, with the same tokens.
        """
        encode = self._model.encode
        if any("\n" in self._model.id_to_piece(i) for i in range(self.vocab_size)):
            return None
        extra = len(encode("\n")) - 1
        for left, right in (("a", "\nb"), ("a  ", "\n  b"), ("\n", "\n\n "), ("a\r", "\n<s>")):
            if encode(left) + encode(right)[extra:] != encode(left + right):
                return None
        return extra

    def _encode(self, text: str) -> list[int]:
        if self._line_start is None or len(text) < 2000:
            return self._model.encode(text)
        first, *rest = _cut_at_newlines(text, 1000)
        ids = self._model.encode(first)
        for piece in rest:
            ids += self._model.encode(piece)[self._line_start :]
        return ids

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


def _cut_at_newlines(text: str, size: int) -> list[str]:
    pieces, start = [], 0
    while (end := text.find("\n", start + size)) >= 0:
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


class TiktokenTokenizer(Tokenizer):
    """A file of base64 byte sequences and ranks (Llama 3): the ranks, then 256 specials, of which
    the first is BOS and the second EOS. Every text survives a round trip."""

    kind = "tiktoken"

    def __init__(self, path: Path) -> None:
        import tiktoken

        content = path.read_bytes()
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(content.splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise UserError(
                    f"{path}:{number}: not a line of base64 token and rank: the file is damaged"
                ) from None
        size = len(ranks)
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        if sorted(ranks.values()) != list(range(size)) or missing:
            raise UserError(f"{path}: ranks are not 0..{size - 1} over all 256 bytes: damaged file")
        self.files = (path,)
        self.vocab_size = size + _LLAMA3_NUM_SPECIALS
        self.bos_id, self.eos_id = size, size + 1
        self.fingerprint = _fingerprint(self.kind, content, self.bos_id, self.eos_id)
        self.control_ids = {name: size + i for i, name in _LLAMA3_CONTROL.items()}
        self._num_ranks = size
        self.ranks, self.words = ranks, _LLAMA3_WORDS
        self._encoding = tiktoken.Encoding(
            name=path.name, pat_str=_LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens={}
        )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for start in range(0, len(text), _LLAMA3_MAX_CHARS):
            for piece in cut_long_runs(text[start : start + _LLAMA3_MAX_CHARS], _LLAMA3_MAX_RUN):
                ids += self._encoding.encode_ordinary(piece)
        return ids

    def _decode(self, ids: list[int]) -> str:
        known = [i for i in ids if i < self._num_ranks]
        return self._encoding.decode_bytes(known).decode("utf-8", "replace")


def cut_long_runs(text: str, size: int) -> list[str]:
    """Pieces of a text in which no run of spaces, or of non-spaces, exceeds `size` characters."""
    if len(text) <= size:
        return [text]
    cuts = [0]
    for run in re.finditer(r"\s+|\S+", text):
        cuts += range(run.start() + size, run.end(), size)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, and `tokenizer_config.json` beside it for BOS and EOS.

    A round trip holds as far as the file's own normaliser loses nothing. With one control token
    for both ends (GPT-2, SmolLM2), it serves as BOS and as EOS.
    """

    kind = "huggingface"

    def __init__(self, path: Path) -> None:
        import tokenizers

        content = path.read_bytes()
        try:
            spec = json.loads(content)
            full = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f"{path}: not a Hugging Face tokenizer.json ({str(error)[:200]})"
            ) from error
        config = path.parent / "tokenizer_config.json"
        self.files = (path, config) if config.is_file() else (path,)
        vocab = full.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.bos_id, self.eos_id = find_ends(path, spec, config, vocab)
        self.fingerprint = _fingerprint(self.kind, content, self.bos_id, self.eos_id)
        self.control_ids = {t["content"]: t["id"] for t in spec.get("added_tokens") or []}
        self._control = set(self.control_ids.values())
        self._control |= {self.bos_id, self.eos_id}
        full.no_truncation()
        full.no_padding()
        self._decoder = full
        names = {t["content"] for t in spec.get("added_tokens") or []}
        names |= {name for name, i in vocab.items() if i in (self.bos_id, self.eos_id)}
        self._encoder = tokenizers.Tokenizer.from_str(json.dumps(without_control(spec, names)))
        newline = self._encode("\n")
        if len(newline) == 2 and full.id_to_token(newline[0]) == "\u2581":
            self._after_newline = 2

    def _encode(self, text: str) -> list[int]:
        return self._encoder.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        plain = [i for i in ids if i not in self._control]
        return self._decoder.decode(plain, skip_special_tokens=False)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that `path` holds: `byte`, a file of one of the known kinds, or a directory
    with one (a prepared data set, a Hugging Face model). UserError if it is none of these."""
    if str(path) == "byte":
        return ByteTokenizer()
    if str(path).startswith("train:"):
        raise UserError(f"{path}: only llamajax.prepare trains a tokenizer; name its output here")
    file = Path(path)
    if file.is_dir():
        file = _file_in(file)
    if not file.is_file():
        raise UserError(f"tokenizer {path}: no such file; give a file, a directory or `byte`")
    if file.suffix == ".byte":
        return ByteTokenizer()
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file)
    with file.open("rb") as stream:
        first_line = stream.readline(4096)
    if re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\r?\n?", first_line):
        return TiktokenTokenizer(file)
    return SentencePieceTokenizer(file)


def _file_in(directory: Path) -> Path:
    manifest = directory / MANIFEST
    if manifest.is_file():
        try:
            return directory / json.loads(manifest.read_text("utf-8"))["tokenizer"]["file"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{manifest}: damaged; run llamajax.prepare again") from error
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer.byte"):
        if (directory / name).is_file():
            return directory / name
    raise UserError(
        f"{directory}: no tokenizer.json, tokenizer.model or manifest.json in this directory"
    )
