"""Read prepared data: the order of samples, batches, and the record of what a run has read.

Free of jax. Each name is imported when it is first used: grain takes two seconds to import, and
`prepare` and its workers do not need it.
"""

import importlib
from typing import Any

from llamajax.tokenizers import Tokenizer, load_tokenizer

_FILE_OF = {
    "Ledger": "ledger",
    "Mixture": "mixture",
    "Position": "position",
    "Segment": "position",
    "check_ledger": "ledger",
    "eval_batches": "batches",
    "has_split": "mixture",
    "left_out": "stages",
    "open_mixture": "mixture",
    "open_stages": "stages",
    "open_validation_sets": "mixture",
    "sample_ids": "batches",
    "tokens_reached": "stages",
    "train_batches": "batches",
    "with_packing": "stages",
    "with_stages": "stages",
    "packings_read": "stages",
}

BATCH_KEYS = ("tokens", "targets", "positions", "segment_ids", "loss_mask")

__all__ = ["BATCH_KEYS", "Tokenizer", "load_tokenizer", *_FILE_OF]


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILE_OF[name]}"), name)
