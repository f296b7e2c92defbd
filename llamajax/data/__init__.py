"""Read prepared data: the order of samples, batches, and the record of what a run has read.

Free of jax. Each name is imported when it is first used: grain takes two seconds to import, and
`prepare` and its workers do not need it.
"""

import importlib
from typing import Any

from llamajax.tokenizers import Tokenizer, load_tokenizer

_NAMES = {
    "batches": ("eval_batches", "sample_ids", "train_batches"),
    "ledger": ("Ledger", "check_ledger"),
    "mixture": ("Mixture", "has_split", "open_mixture", "open_validation_sets"),
    "position": ("Position", "Segment"),
    "stages": (
        "left_out", "open_stages", "packings_read", "tokens_reached", "with_packing", "with_stages",
    ),
}  # fmt: skip
_FILE_OF = {name: file for file, names in _NAMES.items() for name in names}

BATCH_KEYS = ("tokens", "targets", "positions", "segment_ids", "loss_mask")

__all__ = ["BATCH_KEYS", "Tokenizer", "load_tokenizer", *_FILE_OF]


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILE_OF[name]}"), name)
