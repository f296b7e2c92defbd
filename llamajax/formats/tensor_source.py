"""Where foreign weights come from: tensors by their Hugging Face names, read one at a time.

One class a format; what the names and layouts mean for our model is `hf_names.py`, how tensors
reach the shards of a mesh is `hf_read.py`. A source yields Hugging Face's layout (a q or k of a
format that interleaves the two halves of a head is put right by its source).
"""

import dataclasses
from pathlib import Path
from typing import Protocol

import numpy as np

from llamajax.checkpoint.parts import Index
from llamajax.config.schema import ModelConfig
from llamajax.errors import UserError


class TensorSource(Protocol):
    """Tensors named as in a Hugging Face Llama: `model.layers.3.self_attn.q_proj.weight`."""

    def names(self) -> list[str]:
        """Names of all tensors; free of reading any."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""

    def dtype(self, name: str) -> np.dtype:
        """Dtype that `read` gives: bfloat16, float16 or float32 for weights."""

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """One tensor, or the part of it that `index` (a slice a dimension) selects.

        The memory it takes is that of the part; nothing is kept.
        """

    def where(self, name: str) -> str:
        """File of one tensor, for messages."""

    def close(self) -> None:
        """Let go of open files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreign:
    """What a recogniser of a foreign format found: architecture, tokenizer, tensors."""

    model: ModelConfig
    tokenizer: Path | None
    source: TensorSource


def check_finite(array: np.ndarray, source: TensorSource, name: str) -> None:
    """Raise UserError where (a part of) a tensor of weights holds a NaN or an infinity."""
    with np.errstate(all="ignore"):
        if np.isfinite(array.sum(dtype=np.float32)) or np.isfinite(array).all():
            return
    raise UserError(
        f"{source.where(name)}: {name} holds {np.count_nonzero(~np.isfinite(array)):,} values that "
        "are NaN or infinite; convert or download the weights again, or take an earlier checkpoint"
    )
