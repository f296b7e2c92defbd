"""Prepared directories of a few documents, and the stream of tokens that they must hold."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from llamajax import prepare
from llamajax.config.schema import DataConfig
from llamajax.data import Mixture, open_mixture
from llamajax.data.shards import BLOCK_TOKENS

BOS, EOS = 256, 257


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., Path]:
    """Prepare documents, or objects of JSON lines; all of them for training without other flags."""

    def write(name: str, lines: Sequence[object], *flags: str, tokenizer: str = "byte") -> Path:
        source = tmp_path / f"{name}.jsonl"
        lines = [{"text": line} if isinstance(line, str) else line for line in lines]
        source.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        args = [f"--input={source}", f"--output={tmp_path / name}", "--workers=1"]
        if not any("validation_fraction" in flag for flag in flags):
            args.append("--validation_fraction=0")
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


@pytest.fixture
def opened(config) -> Callable[..., Mixture]:
    """The mixture of paths, with what a test changes of the config."""

    def open_paths(*paths: Path, split: str = "train", **changes: object) -> Mixture:
        data = config(*paths, **changes)
        return open_mixture(data, split=split, vocab_size=258, verify=True)

    return open_paths


@pytest.fixture
def mixture(opened, prepared, documents) -> Mixture:
    """The documents, in samples of 100 tokens."""
    return opened(prepared("a", documents))
