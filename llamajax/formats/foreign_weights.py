"""What readers and writers of foreign weights share: the interface and the architecture.

Each format has one class that yields tensors by their Hugging Face names and in Hugging Face's
layout. What these mean for our model is in `hf_names.py`; how tensors reach the shards of a mesh is
in `hf_read.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.checkpoint.stored_array import Index
from llamajax.config import build_model
from llamajax.config.presets import PRESETS
from llamajax.config.schema import ModelConfig
from llamajax.errors import UserError, combine, say
from llamajax.tokenizers import Tokenizer

# transformers' own default where a config.json states none; imported weights never use it.
_INIT_STD = 0.02


class TensorSource:
    """Tensors named as in a Hugging Face Llama: `model.layers.3.self_attn.q_proj.weight`.

    One subclass a format. `_tensors`: by name, what has the `shape` and `dtype` of a tensor.
    """

    _tensors: Mapping[str, Any]

    def names(self) -> list[str]:
        """Names of all tensors; reads none."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype that `read` returns: bfloat16, float16 or float32 for weights."""
        return self._tensors[name].dtype

    def where(self, name: str) -> str:
        """File of one tensor, for messages."""
        raise NotImplementedError

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """One tensor, or the part of it that `index` (a slice a dimension) selects.

        Takes no more memory than that part, and keeps nothing.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignWeights:
    """What a path in a foreign format holds: architecture, tokenizer, tensors."""

    model: ModelConfig
    tokenizer: Path | None
    source: TensorSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """What is written in a foreign format: tensors, their architecture, and what goes along.

    card: makes the model card of a Hugging Face directory.
    """

    model: ModelConfig
    source: TensorSource
    tokenizer: Tokenizer | None
    card: Callable[[], bytes] | None = None


def check_finite(array: np.ndarray, source: TensorSource, name: str) -> None:
    """Raise UserError if (a part of) a tensor of weights holds a NaN or an infinity."""
    with np.errstate(all="ignore"):
        if np.isfinite(array.sum(dtype=np.float32)) or np.isfinite(array).all():
            return
    raise UserError(
        f"{source.where(name)}: {name} holds {np.count_nonzero(~np.isfinite(array)):,} values that "
        "are NaN or infinite; convert or download the weights again, or take an earlier checkpoint"
    )


def read_as(source: TensorSource, name: str, dtype: np.dtype) -> np.ndarray:
    """Read a tensor in another dtype. Raises UserError for NaN, infinity, and beyond float16."""
    stored = source.read(name)
    check_finite(stored, source, name)
    with np.errstate(over="ignore"):
        array = stored.astype(dtype, copy=False)
    if dtype == np.float16 and not np.isfinite(array).all():
        raise UserError(
            f"{name} holds values beyond float16's largest, 65504; use --dtype=bfloat16 or float32"
        )
    return array


def same_matrix(
    source: TensorSource, one: str, other: str, *, shape: tuple[int, ...] | None = None
) -> bool:
    """Compare two matrices of a source, a few rows at a time; only their first `shape` if given."""
    if shape is None and source.shape(one) != source.shape(other):
        return False
    rows, width = shape or source.shape(one)
    for start in range(0, rows, 4096):
        index = (slice(start, min(start + 4096, rows)), slice(0, width))
        if not np.array_equal(source.read(one, index), source.read(other, index)):
            return False
    return True


def imported_model(path: Path, *, max_seq_len: int | None, **facts: Any) -> ModelConfig:
    """Build the architecture of `facts` (keys of ModelConfig). UserError lists every problem.

    Neither a GGUF file nor Meta's params.json states the deviation of the initial weights, and
    Meta's may not state the context length: both are those of the preset that it otherwise equals.
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
        max_seq_len = 4096 if model.rope_theta == 10_000.0 else 8192
        if model.rope_scaling is not None:  # Llama 3.1: 131,072 for 8,192
            max_seq_len = 16 * model.rope_scaling.original_max_seq_len
        note(path, f"it does not say how long a sequence may be: {max_seq_len} tokens are assumed")
    return dataclasses.replace(model, max_seq_len=max_seq_len)


def note(path: Path, text: str) -> None:
    """Print one line on stderr about something that was assumed or left out."""
    say(f"note: {path}: {text}")


def select(shape: Sequence[int], index: Index | None) -> tuple[tuple[int, ...], range, range]:
    """Return what `array[index]` of an array of one or two dims takes: its shape, rows and columns.

    A vector is one row. `index` holds one slice a dim, of step 1; None takes all.
    """
    slices = index if index is not None else (slice(None),) * len(shape)
    ranges = [range(n)[s] for n, s in zip(shape, slices, strict=True)]
    taken = tuple(len(r) for r in ranges)
    return taken, (ranges[0] if len(ranges) == 2 else range(1)), ranges[-1]
