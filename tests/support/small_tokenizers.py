"""Small tokenizer files of the kinds that models come with."""

import base64
from pathlib import Path

import sentencepiece


def small_sentencepiece(directory: Path, assets: Path) -> Path:
    """Train a model of 400 pieces as Llama 2's was made."""
    text = (assets / "text" / "moby_dick.txt").read_text("utf-8")[:60_000]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")), model_prefix=str(directory / "small"),
        model_type="bpe", vocab_size=400, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
    )  # fmt: skip
    return directory / "small.model"


SYLLABLES = (b"al", b"all", b" m", b" me", b"hm", b"ae", b"hmae")


def small_ranks(file: Path, syllables: tuple[bytes, ...] = SYLLABLES) -> Path:
    """A rank file: the bytes, then syllables."""
    ranks = [*(bytes([b]) for b in range(256)), *syllables]
    lines = (f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(ranks))
    file.write_text("".join(lines))
    return file
