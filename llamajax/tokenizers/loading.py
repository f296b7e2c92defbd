"""Tokenizers behind one small interface: SentencePiece, tiktoken ranks, Hugging Face JSON, bytes.

Training a new one lives in `tokenizer_training.py`. Whatever a text contains, `encode` returns
ordinary tokens only: BOS and EOS are placed by those who know where a document starts and ends.
"""

import base64
import binascii
import dataclasses
import itertools
import json
import re
from pathlib import Path

from llamajax.errors import UserError
from llamajax.tokenizers.base import Tokenizer, fingerprint_of
from llamajax.tokenizers.special_tokens import (
    ALWAYS_CONTROL,
    find_ends,
    num_used,
    of_another_model,
    read_facts,
)
from llamajax.tokenizers.tokenizer_json import ends_of_template, without_control

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


class ByteTokenizer(Tokenizer):
    """The 256 byte values, then BOS 256 and EOS 257; every text survives a round trip."""

    kind = "byte"
    vocab_size, bos_id, eos_id = 258, 256, 257
    fingerprint = fingerprint_of("byte", b"", 258, 256, 257)

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
        self.facts = read_facts(path)
        size = self._model.vocab_size()
        pieces = {self._model.id_to_piece(i): i for i in range(size)}
        added = {name: i for name, (i, _) in self.facts.added.items() if i >= size}
        self.vocab_size = num_used(pieces | added)
        if sorted(added.values()) != list(range(size, size + len(added))):
            raise of_another_model(path, added.values(), size)
        own = tuple(i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id()))
        facts = self.facts
        if own[0] is None:
            facts = dataclasses.replace(facts, named={"bos_token": None, **facts.named})
        self.bos_id, self.eos_id, self.warnings = find_ends(
            path, facts, pieces | added, own=own, added=added
        )
        self.control_ids = {name: i for name, i in pieces.items() if self._model.is_control(i)}
        self.control_ids |= {
            name: i
            for name, i in added.items()
            if facts.added[name][1] or name in ALWAYS_CONTROL or i in (self.bos_id, self.eos_id)
        }
        self.added_ids = {name: i for name, i in added.items() if name not in self.control_ids}
        self._added_names = {i: name for name, i in self.added_ids.items()}
        self._splitter = re.compile(
            f"({'|'.join(map(re.escape, sorted(self.added_ids, reverse=True)))})"
        )
        self.fingerprint = fingerprint_of(
            self.kind, content, self.bos_id, self.eos_id, *filter(None, [self.added_ids])
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
        """Tokens that a piece starting with a newline has too many; None if lines interact.

        No piece of Llama 2 holds a newline, so that lines can be encoded one by one: three times
        faster than a whole book, with the same tokens.
        """
        encode = self._model.encode
        if not self._model.is_byte((encode("\n") or [self._model.unk_id()])[-1]):
            return None  # a newline is part of a word, or lost: lines are not encoded on their own
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
            elif ids and part and self._after_newline:  # no space goes before what follows a token
                ids += self._encode_pieces("\n" + part)[self._after_newline :]
            else:
                ids += self._encode_pieces(part)
        return ids

    def _encode_pieces(self, text: str) -> list[int]:
        if self._line_start is None or len(text) < 2000:
            return self._model.encode(text)
        first, *rest = _cut_at_newlines(text, 1000)
        ids = self._model.encode(first)
        for piece in rest:
            ids += self._model.encode(piece)[self._line_start :]
        return ids

    def _decode(self, ids: list[int]) -> str:
        """Text of each run of pieces, and of the added tokens between them.

        Only the first run starts a text, whose space SentencePiece put there: "a" precedes others.
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
        self.facts = read_facts(path)
        self.control_ids = {name: size + i for i, name in _LLAMA3_CONTROL.items()}
        self.bos_id, self.eos_id, _ = find_ends(
            path, self.facts, self.control_ids, own=(size, size + 1), added=()
        )
        self.fingerprint = fingerprint_of(self.kind, content, self.bos_id, self.eos_id)
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
    """A Hugging Face `tokenizer.json`, and the files beside it for BOS, EOS and added tokens.

    A round trip holds as far as the file's own normaliser loses nothing. Added tokens that are not
    special are encoded and decoded like any other.
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
        self.files = (path,)
        self.facts = read_facts(path)
        vocab = full.get_vocab(with_added_tokens=True)
        more = sorted((i, n, s) for n, (i, s) in self.facts.added.items() if n not in vocab)
        if more:
            full.add_tokens(
                [tokenizers.AddedToken(n, special=s, normalized=False) for _, n, s in more]
            )
            if any(full.token_to_id(n) != i for i, n, _ in more):
                raise of_another_model(path, [i for i, *_ in more], len(vocab))
            spec, vocab = json.loads(full.to_str()), full.get_vocab(with_added_tokens=True)
        self.vocab_size = num_used(vocab)
        listed = spec.get("added_tokens") or []
        ends = ends_of_template(spec.get("post_processor"))
        self.bos_id, self.eos_id, self.warnings = find_ends(
            path,
            self.facts,
            vocab,
            own=tuple(vocab.get(end or "") for end in ends),
            added={t["content"] for t in listed},
        )
        of_ends = {name for name, i in vocab.items() if i in (self.bos_id, self.eos_id)}
        self.control_ids = {
            t["content"]: t["id"]
            for t in listed
            if t["special"] or t["content"] in {*ALWAYS_CONTROL, *of_ends}
        }
        self._control = {*self.control_ids.values(), self.bos_id, self.eos_id}
        names = of_ends | set(self.control_ids)
        others = {t["content"]: t["id"] for t in listed if t["content"] not in names}
        self.added_ids = others
        self.fingerprint = fingerprint_of(
            self.kind, content, self.bos_id, self.eos_id, *filter(None, [others])
        )
        full.no_truncation()
        full.no_padding()
        self._decoder = full
        self._encoder = tokenizers.Tokenizer.from_str(json.dumps(without_control(spec, names)))
        # The ids of added tokens that the encoder counts otherwise, since it lacks some.
        pairs = [(self._encoder.token_to_id(name), i) for name, i in others.items()]
        self._renumbered = {theirs: i for theirs, i in pairs if theirs != i}
        newline = self._encode("\n")
        if len(newline) == 2 and full.id_to_token(newline[0]) == "\u2581":
            self._after_newline = 2

    def _encode(self, text: str) -> list[int]:
        ids = self._encoder.encode(text, add_special_tokens=False).ids
        return [self._renumbered.get(i, i) for i in ids] if self._renumbered else ids

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
        raise UserError(
            f"tokenizer {path}: no such file; give a file, a directory or `byte`; a model of the"
            " Hugging Face hub is downloaded first"
        )
    if file.suffix == ".byte":
        return ByteTokenizer()
    with file.open("rb") as stream:
        first_line = stream.readline(4096)
    if first_line.startswith(b"version https://git-lfs"):
        raise UserError(f"{file}: is a pointer of git-lfs, not the file itself; run `git lfs pull`")
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file)
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
