"""Text to tokens to batches: tokenizers, sources, prepared shards, the order of samples, batches.

Free of jax. `load_tokenizer` costs nothing else; the names of the reading side are imported when
first used, because grain takes two seconds to import and workers of `prepare` do not need it.
"""

import importlib
from typing import Any

from llamajax.tokenizers import Tokenizer, load_tokenizer

_READING = {
    "BATCH_KEYS": "batches",
    "Ledger": "ledger",
    "Mixture": "mixture",
    "Position": "position",
    "check_ledger": "ledger",
    "has_split": "mixture",
    "open_mixture": "mixture",
    "eval_batches": "batches",
    "num_eval_batches": "batches",
    "sample_ids": "batches",
    "train_batches": "batches",
}

__all__ = ["Tokenizer", "load_tokenizer", *_READING]


def __getattr__(name: str) -> Any:
    if name not in _READING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_READING[name]}"), name)
