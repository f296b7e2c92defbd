"""Small tokenizers of three kinds, and the writing of their files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from small_tokenizers import small_ranks
from tokenizers import models, pre_tokenizers

from llamajax.data import load_tokenizer
from llamajax.tokenizers import Tokenizer
from llamajax.tokenizers.tokenizer_export import export_tokenizer


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3 in small: the bytes and a few merges, and the same 256 control tokens."""
    file = tmp_path_factory.mktemp("ranks") / "tokenizer.model"
    return small_ranks(file, (b"th", b"the", b" t", b"<s", b"<s>"))


@pytest.fixture(scope="session")
def byte_level() -> Callable[[list[str]], tokenizers.Tokenizer]:
    """A byte-level BPE of 258 tokens as Llama 3's tokenizer.json, `<s>` spelled by merges."""

    def make(specials: list[str]) -> tokenizers.Tokenizer:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {piece: i for i, piece in enumerate([*alphabet, "<s", "<s>"])}
        model = models.BPE(vocab=vocab, merges=[("<", "s"), ("<s", ">")], ignore_merges=True)
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.add_special_tokens(specials)
        return tokenizer

    return make


@pytest.fixture(scope="session")
def store() -> Callable[..., Path]:
    """Save a tokenizer.json, and JSON files beside it by name; return the directory."""

    def save(directory: Path, model: tokenizers.Tokenizer | None = None, **files: object) -> Path:
        directory.mkdir(exist_ok=True)
        if model is not None:
            model.save(str(directory / "tokenizer.json"))
        for name, content in files.items():
            (directory / f"{name}.json").write_text(json.dumps(content), "utf-8")
        return directory

    return save


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Tokenizer]:
    """Export a tokenizer to `tmp_path / "export"` and load it from there."""

    def through_files(tokenizer: Tokenizer, *, num_warnings: int = 0) -> Tokenizer:
        (tmp_path / "export").mkdir()
        assert len(export_tokenizer(tokenizer, tmp_path / "export")) == num_warnings
        return load_tokenizer(tmp_path / "export")

    return through_files
