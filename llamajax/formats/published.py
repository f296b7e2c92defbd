"""Architectures as other formats describe them, completed and checked.

Neither a GGUF file nor Meta's params.json states the deviation of the initial weights, and Meta's
does not state the context length either; both are those of the preset that it otherwise equals.
"""

import dataclasses
from pathlib import Path
from typing import Any

from llamajax.config.build import build_model
from llamajax.config.presets import PRESETS
from llamajax.config.schema import ModelConfig
from llamajax.errors import combine, say

# transformers' own default where a config.json states none; imported weights never use it.
_INIT_STD = 0.02


def imported_model(path: Path, *, max_seq_len: int | None, **facts: Any) -> ModelConfig:
    """The architecture of `facts` (keys of ModelConfig) in `path`, or UserError with every problem.

    max_seq_len: None where the format is silent: then the preset's, else that of the generation
    (Llama 2, 3 or 3.1), which the rotary embedding tells.
    """
    model, problems = build_model(facts | {"init_std": _INIT_STD, "max_seq_len": max_seq_len or 1})
    if model is None:
        raise combine(problems, title=f"{path} describes a model that cannot be:")
    silent = {"name": "", "init_std": 0.0, "max_seq_len": 0}
    for known in PRESETS.values():
        if dataclasses.replace(known, **silent) == dataclasses.replace(model, **silent):
            longest = known.max_seq_len if max_seq_len is None else max_seq_len
            return dataclasses.replace(known, max_seq_len=longest)
    if max_seq_len is None:
        max_seq_len = _context_length(model)
        note(path, f"it does not say how long a sequence may be: {max_seq_len} tokens are assumed")
    return dataclasses.replace(model, max_seq_len=max_seq_len)


def _context_length(model: ModelConfig) -> int:
    if model.rope_scaling is not None:
        return 16 * model.rope_scaling.original_max_seq_len  # Llama 3.1: 131,072 for 8,192
    return 4096 if model.rope_theta == 10_000.0 else 8192


def note(path: Path, text: str) -> None:
    """One line on stderr about something that was assumed or left out."""
    say(f"note: {path}: {text}")
