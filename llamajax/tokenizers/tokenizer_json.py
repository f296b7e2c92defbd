"""Tokenizers of Hugging Face: `tokenizer.json`, and the files beside it."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamajax.errors import UserError
from llamajax.tokenizers.byte_level import proven_encoding
from llamajax.tokenizers.safe_cuts import cuts_of_json
from llamajax.tokenizers.special_tokens import (
    SpecialTokens,
    find_special_tokens,
    foreign_tokens,
    num_used,
    read_facts,
)
from llamajax.tokenizers.tiktoken_ranks import cut_long_runs
from llamajax.tokenizers.tokenizer import Tokenizer, fingerprint_of

# Shorter texts are not worth the second that the proof for tiktoken takes; in longer words tiktoken
# is slow, in time that grows with the square of the length.
_FAST_CHARS, _FAST_WORD_CHARS = 20_000, 2_000


class _PlainEncoder:
    """The library's tokenizer without the control tokens, and tiktoken where it makes the same ids.

    spec: the tokenizer.json. ids: of the added tokens that it keeps.
    """

    def __init__(self, spec: dict[str, Any], ids: Mapping[str, int]) -> None:
        import tokenizers

        self._spec = spec
        self._model = tokenizers.Tokenizer.from_str(json.dumps(spec))
        # It lacks some added tokens, so that it numbers the others anew.
        pairs = [(self._model.token_to_id(name), i) for name, i in ids.items()]
        self._renumbered = {theirs: i for theirs, i in pairs if theirs != i}
        self.find_cut = cuts_of_json(spec)

    @functools.cached_property
    def _fast(self) -> Any:
        """A tiktoken encoding; None where it is not proven to make the same ids."""
        return proven_encoding(self._spec)

    def encode(self, text: str) -> list[int]:
        is_long = len(text) >= _FAST_CHARS and len(cut_long_runs(text, _FAST_WORD_CHARS)) == 1
        if is_long and self._fast:
            return self._fast.encode_ordinary(text)
        ids = self._model.encode(text, add_special_tokens=False).ids
        return [self._renumbered.get(i, i) for i in ids] if self._renumbered else ids


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, and the files beside it for BOS, EOS and added tokens.

    Decoding restores a text as far as the file's own normalizer loses nothing. Added tokens that
    are not special are encoded and decoded like any other.
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
        self.file = path
        self.facts = read_facts(path)
        vocab = full.get_vocab(with_added_tokens=True)
        more = sorted((i, n, s) for n, (i, s) in self.facts.added.items() if n not in vocab)
        if more:
            full.add_tokens(
                [tokenizers.AddedToken(n, special=s, normalized=False) for _, n, s in more]
            )
            if any(full.token_to_id(n) != i for i, n, _ in more):
                raise foreign_tokens(path, [i for i, *_ in more], len(vocab))
            spec, vocab = json.loads(full.to_str()), full.get_vocab(with_added_tokens=True)
        self.vocab_size = num_used(vocab)
        full.no_truncation()
        full.no_padding()
        self.special = self._special_tokens(full, spec.get("added_tokens") or [], vocab)
        self.fingerprint = fingerprint_of(self.kind, content, self.special)
        self._decoder = full
        names = {name for name, i in vocab.items() if i in self._control}
        self._encoder = _PlainEncoder(_without_control(spec, names), self.added_ids)
        newline = self._encode("\n")
        if len(newline) == 2 and full.id_to_token(newline[0]) == "\u2581":
            self._after_newline = 2

    @property
    def _control(self) -> set[int | None]:
        return {*self.control_ids.values(), self.bos_id, self.eos_id}

    def _special_tokens(
        self, library: Any, added: list[dict[str, Any]], vocab: dict[str, int]
    ) -> SpecialTokens:
        """Find BOS, EOS and added tokens.

        The post-processor alone decides what begins a text, as in transformers since version 5.
        """
        listed = {t["content"]: (t["id"], t["special"]) for t in added}
        texts = (text for text in ("a", *vocab) if text not in listed)  # any that has tokens
        text = next((t for t in texts if library.encode(t, add_special_tokens=False).ids), "a")
        plain, whole = (library.encode(text, add_special_tokens=s).ids for s in (False, True))
        start = next(i for i in range(len(whole) + 1) if whole[i : i + len(plain)] == plain)
        before, after = whole[:start], whole[start + len(plain) :]
        own = (next(iter(before), None), next(reversed(after), None))
        special = find_special_tokens(self.file, self.facts, vocab, own=own, added=listed)
        adds_bos, warnings = bool(before), special.warnings
        if special.bos_id is not None and self.facts.add_bos not in (None, adds_bos):
            warnings += (
                f"{self.file} puts {'a' if adds_bos else 'no'} BOS before texts, although "
                f"tokenizer_config.json has add_bos_token: {json.dumps(self.facts.add_bos)}; "
                "transformers 5 ignores that beside a tokenizer.json, and so do we for new data",
            )
        return dataclasses.replace(special, adds_bos=adds_bos, warnings=warnings)

    def begin_as_recorded(self, fingerprint: str) -> None:
        """Begin texts with BOS if data or a checkpoint record that: versions until 2026-11 did."""
        older = dataclasses.replace(self.special, adds_bos=True)
        if fingerprint == fingerprint_of(self.kind, self.file.read_bytes(), older):
            self.special, self.fingerprint = older, fingerprint

    def safe_cut(self, text: str, at: int) -> int | None:
        return self._encoder.find_cut and self._encoder.find_cut(text, at)

    def _encode(self, text: str) -> list[int]:
        return self._encoder.encode(text)

    def encode_rendered(self, text: str, *, as_text: str) -> list[int]:
        if as_text in text:
            return super().encode_rendered(text, as_text=as_text)
        return self._decoder.encode(text, add_special_tokens=False).ids  # as transformers does

    def _size(self, token: int) -> int:
        piece = self._decoder.id_to_token(token)  # a letter for each byte, or the name of one byte
        return 1 if piece.startswith("<0x") else len(piece)

    def _decode(self, ids: list[int]) -> str:
        control = self._control
        return self._decoder.decode([i for i in ids if i not in control], skip_special_tokens=False)


def _without_control(spec: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Return a tokenizer.json whose control tokens no text can reach.

    They leave the list of added tokens, which the library searches in a text before anything else.
    Those that the model's vocabulary holds as well get a name that no text can spell. The library
    numbers the remaining added tokens anew, unless they are in the vocabulary.
    """
    model = dict(spec["model"])
    keep = {model.get("unk_token")}
    hidden = {name: f"\ufdd0control:{i}\ufdd1" for i, name in enumerate(sorted(names - keep))}
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {hidden.get(piece, piece): i for piece, i in vocab.items()}
    else:  # Unigram: a list of [piece, score]
        unk = model.get("unk_id")
        model["vocab"] = [
            [piece if i == unk else hidden.get(piece, piece), score]
            for i, (piece, score) in enumerate(vocab)
        ]
    if "merges" in model:
        pairs = [(m, m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        model["merges"] = [m for m, pair in pairs if "".join(pair) not in hidden]
    return spec | {
        "model": model,
        "added_tokens": [t for t in spec.get("added_tokens") or [] if t["content"] not in names],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
