"""Tokenizers of Hugging Face: `tokenizer.json`, and the files beside it."""

import json
from pathlib import Path
from typing import Any

from llamajax.errors import UserError
from llamajax.tokenizers.special_tokens import (
    divide_added,
    find_ends,
    foreign_tokens,
    num_used,
    read_facts,
)
from llamajax.tokenizers.tokenizer import Tokenizer, fingerprint_of


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
        listed = {t["content"]: (t["id"], t["special"]) for t in spec.get("added_tokens") or []}
        ends = _ends_of_template(spec.get("post_processor"))
        own = tuple(vocab.get(end or "") for end in ends)
        self.bos_id, self.eos_id, self.warnings = find_ends(
            path, self.facts, vocab, own=own, added=listed
        )
        self.control_ids, self.added_ids = divide_added(listed, (self.bos_id, self.eos_id))
        self._control = {*self.control_ids.values(), self.bos_id, self.eos_id}
        self.fingerprint = fingerprint_of(
            self.kind, content, self.bos_id, self.eos_id, self.added_ids
        )
        full.no_truncation()
        full.no_padding()
        self._decoder = full
        names = {name for name, i in vocab.items() if i in self._control}
        self._encoder = tokenizers.Tokenizer.from_str(json.dumps(_without_control(spec, names)))
        # The encoder lacks some added tokens, so that it numbers the others anew.
        pairs = [(self._encoder.token_to_id(name), i) for name, i in self.added_ids.items()]
        self._renumbered = {theirs: i for theirs, i in pairs if theirs != i}
        newline = self._encode("\n")
        if len(newline) == 2 and full.id_to_token(newline[0]) == "\u2581":
            self._after_newline = 2

    def _encode(self, text: str) -> list[int]:
        ids = self._encoder.encode(text, add_special_tokens=False).ids
        return [self._renumbered.get(i, i) for i in ids] if self._renumbered else ids

    def encode_rendered(self, text: str, *, as_text: str) -> list[int]:
        if as_text in text:
            return super().encode_rendered(text, as_text=as_text)
        return self._decoder.encode(text, add_special_tokens=False).ids  # as transformers does

    def _decode(self, ids: list[int]) -> str:
        plain = [i for i in ids if i not in self._control]
        return self._decoder.decode(plain, skip_special_tokens=False)


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


def _ends_of_template(processor: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """Return the names of the tokens that the post-processor puts before and after a text."""
    if not processor:
        return None, None
    if processor.get("type") == "Sequence":
        found = [_ends_of_template(p) for p in processor.get("processors", [])]
        return next((f for f in found if any(f)), (None, None))
    single = processor.get("single")
    if not isinstance(single, list) or not single:
        return None, None
    bos, eos = (end.get("SpecialToken", {}).get("id") for end in (single[0], single[-1]))
    return bos, eos
