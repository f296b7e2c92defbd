"""Prepared directories out of a few documents, and the stream of tokens that they must hold."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from llamajax import prepare
from llamajax.config.schema import DataConfig
from llamajax.data.shards import BLOCK_TOKENS

BOS, EOS = 256, 257

Prepare = Callable[..., Path]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepare:
    """Writes documents with the byte tokenizer; all of them to train unless told otherwise."""

    def write(name: str, documents: Sequence[str], *flags: str, tokenizer: str = "byte") -> Path:
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), "utf-8")
        args = [f"--input={source}", f"--output={tmp_path / name}", "--workers=1"]
        flags = flags or ("--validation_fraction=0",)
        assert prepare.main([*args, f"--tokenizer={tokenizer}", *flags]) == 0
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Five blocks of text; one document ends exactly with a block, others are short or long."""
    rng = np.random.default_rng(5)
    sizes = [BLOCK_TOKENS - 2, 1, 3, 7000, 40, 41, 900, BLOCK_TOKENS, 2, 5000, 17]
    return ["".join(chr(97 + c) for c in rng.integers(0, 26, n)) for n in sizes]


@pytest.fixture(scope="session")
def stream(documents: list[str]) -> np.ndarray:
    """All their tokens, BOS and EOS included."""
    return np.array([t for d in documents for t in (BOS, *d.encode(), EOS)])


@pytest.fixture
def config() -> Callable[..., DataConfig]:
    """A DataConfig of paths, with what a test changes."""

    def make(*paths: Path, **changes: object) -> DataConfig:
        settings = {"seq_len": 100, "global_batch_size": 4, "seed": 11} | changes
        return DataConfig(path=",".join(map(str, paths)), **settings)

    return make
