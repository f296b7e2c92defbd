"""Write weights as a GGUF file that llama.cpp reads, tensor after tensor.

Names, metadata and the order of the rows of q and k are those of llama.cpp's convert_hf_to_gguf.py.
The `gguf` package could write it, but it would make an optional extra (with its own dependencies)
necessary for what is a header and the tensors one after another.
"""

import dataclasses
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from llamajax.config.model_schema import ModelConfig, RopeScaling
from llamajax.config.values import show
from llamajax.errors import UserError
from llamajax.files import check_target, remove_partials, replaced_file
from llamajax.formats.foreign_weights import Export, TensorSource, read_as
from llamajax.formats.gguf.gguf_header import MAGIC
from llamajax.formats.gguf.gguf_source import ROPE_FACTORS
from llamajax.formats.gguf.gguf_tokenizer import tokenizer_metadata
from llamajax.formats.huggingface.hf_names import Tensor, interleaved_rows, tensors
from llamajax.formats.huggingface.hf_read import check_tied_head
from llamajax.ops.rope import attention_factor, frequencies

_ALIGNMENT = 32
_FLOAT32, _FLOAT16, _Q8_0, _BFLOAT16 = 0, 1, 8, 30  # ggml's numbers of types
_TYPES = {"float32": _FLOAT32, "float16": _FLOAT16, "bfloat16": _BFLOAT16, "q8_0": _Q8_0}
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7}  # general.file_type
_DTYPES = {_FLOAT32: np.float32, _FLOAT16: np.float16, _BFLOAT16: ml_dtypes.bfloat16}
_BLOCK = 32  # values of a block of Q8_0


@dataclasses.dataclass(frozen=True)
class _Planned:
    """One tensor of the file; tensor: None for the factors of the rotary embedding."""

    name: str
    shape: tuple[int, ...]
    kind: int
    tensor: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        count = math.prod(self.shape)
        if self.kind == _Q8_0:
            return count // _BLOCK * (2 + _BLOCK)
        return count * np.dtype(_DTYPES[self.kind]).itemsize


def write_gguf(
    export: Export, file: Path, *, dtype: str, progress: Callable[[int, int], None]
) -> list[str]:
    """Write weights and tokenizer as one file, in place of another or not at all; return warnings.

    dtype: of the matrices, float32, float16, bfloat16 or q8_0; vectors are float32. Raises
    UserError when it cannot be written, and for what does not fit.
    """
    source, model = export.source, export.model
    check_tied_head(source, model)
    plan, warnings = _plan(model, dtype)
    metadata = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": file.stem,
        "general.size_label": _size_label(sum(math.prod(each.shape) for each in plan)),
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": 2,
        **_model_metadata(model),
    }
    facts, more = tokenizer_metadata(export.tokenizer, model.vocab_size, file)
    total = sum(each.num_bytes for each in plan)
    remove_partials(file)  # of this size, they may be what fills the disk
    check_target(file.absolute().parent, overwrite=True, needed_bytes=total)
    done = 0
    try:
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}") from None
    with replaced_file(file, durable=True, label=str(file)) as hidden, hidden.open("wb") as stream:
        _write_header(stream, metadata | facts, plan)
        for each in plan:
            stream.write(_content(each, source, model))
            stream.write(bytes(-each.num_bytes % _ALIGNMENT))
            done += each.num_bytes
            progress(done, total)
    return warnings + more


def _plan(model: ModelConfig, dtype: str) -> tuple[list[_Planned], list[str]]:
    """Return the tensors in their order, and warnings."""
    plan, wide = [], []
    for tensor in tensors(model):
        kind = _TYPES[dtype] if len(tensor.shape) > 1 else _FLOAT32
        if kind == _Q8_0 and tensor.shape[-1] % _BLOCK:
            kind = _FLOAT16  # as llama.cpp does
            wide.append(tensor.name)
        plan.append(_Planned(tensor.row.gguf_name(tensor.layer), tensor.shape, kind, tensor))
    if model.rope_scaling is not None and model.rope_scaling.type == "llama3":
        plan.append(_Planned(ROPE_FACTORS, (model.head_size // 2,), _FLOAT32))
    if not wide:
        return plan, []
    return plan, [
        f"{len(wide)} matrices are float16, since q8_0 needs rows of a multiple of {_BLOCK}: "
        f"{wide[0]} ..."
    ]


def _size_label(num_parameters: int) -> str:
    """Return a count as the converter of llama.cpp rounds it: two digits at least, as in "4.2M"."""
    power = next((p for p in (12, 9, 6) if num_parameters > 10**p), 3)
    count = num_parameters / 10**power
    digits = max(0, 2 - len(str(round(count)).lstrip("0")))
    return f"{count:.{digits}f}{dict(zip((12, 9, 6, 3), 'TBMK', strict=True))[power]}"


def _model_metadata(model: ModelConfig) -> dict[str, Any]:
    found = {
        "vocab_size": model.vocab_size,
        "context_length": model.max_seq_len,
        "embedding_length": model.hidden_size,
        "block_count": model.num_layers,
        "feed_forward_length": model.intermediate_size,
        "attention.head_count": model.num_heads,
        "attention.head_count_kv": model.num_kv_heads,
        "attention.key_length": model.head_size,
        "attention.value_length": model.head_size,
        "attention.layer_norm_rms_epsilon": float(model.norm_eps),
        "rope.freq_base": float(model.rope_theta),
        "rope.dimension_count": model.head_size,
    }
    if model.rope_scaling is not None:
        found |= _scaling_metadata(model.rope_scaling)
    return {f"llama.{key}": value for key, value in found.items()}


def _scaling_metadata(scaling: RopeScaling) -> dict[str, Any]:
    """Return the keys that llama.cpp reads for a Llama. UserError for what none of them says."""
    found: dict[str, Any] = {}
    if scaling.type != "llama3":  # which is a tensor of factors
        found |= {"type": scaling.type, "factor": float(scaling.factor)}
    if scaling.original_max_seq_len is not None:
        found["original_context_length"] = scaling.original_max_seq_len
    if scaling.type == "yarn":
        plain = RopeScaling(type="yarn", factor=scaling.factor)
        for name in ("beta_fast", "beta_slow", "truncate"):
            if (value := getattr(scaling, name)) != (usual := getattr(plain, name)):
                raise UserError(
                    f"model.rope_scaling.{name} = {show(value)}: llama.cpp computes a Llama's yarn "
                    f"with {show(usual)} whatever the file says; use --format=hf"
                )
        if (ratio := attention_factor(scaling) / attention_factor(plain)) != 1.0:
            found["attn_factor"] = ratio
    return {f"rope.scaling.{key}": value for key, value in found.items()}


def _content(planned: _Planned, source: TensorSource, model: ModelConfig) -> bytes:
    """Return the bytes of one tensor."""
    if planned.tensor is None:
        return _rope_factors(model).astype("<f4").tobytes()
    name, row = planned.tensor.name, planned.tensor.row
    array = read_as(source, name, np.dtype(_DTYPES.get(planned.kind, np.float32)))
    order = interleaved_rows(row, len(array), (model.num_heads, model.num_kv_heads))
    if order is not None:
        array = array[np.argsort(order)]
    return array.tobytes() if planned.kind != _Q8_0 else _quantize(array, name)


def _rope_factors(model: ModelConfig) -> np.ndarray:
    """Return what Llama 3.1's scaling divides each frequency by, float32 (H/2,)."""
    size, theta, scaling = model.head_size, model.rope_theta, model.rope_scaling
    slowed = (frequencies(size, theta=theta, scaling=s) for s in (None, scaling))
    factors = np.divide(*slowed)
    factors[np.isclose(factors, scaling.factor, rtol=1e-6)] = scaling.factor
    return factors


def _quantize(array: np.ndarray, name: str) -> bytes:
    """Return blocks of Q8_0: a float16 scale and 32 int8, rounded half away from zero."""
    blocks = array.reshape(-1, _BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    values = blocks * inverse
    rounded = np.copysign(np.floor(np.abs(values) + np.float32(0.5)), values).astype(np.int8)
    with np.errstate(over="ignore"):
        stored = scale.astype("<f2")
    if not np.isfinite(stored).all():
        raise UserError(f"{name} holds values that are too large for q8_0; use --dtype=bfloat16")
    return np.concatenate([stored.view(np.int8), rounded], axis=1).tobytes()


def _write_header(stream: BinaryIO, metadata: dict[str, Any], plan: Sequence[_Planned]) -> None:
    stream.write(MAGIC + struct.pack("<IQQ", 3, len(plan), len(metadata)))
    for key, value in metadata.items():
        stream.write(_string(key) + b"".join(_value(value)))
    offset = 0
    for each in plan:
        dims = each.shape[::-1]
        stream.write(_string(each.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        stream.write(struct.pack("<IQ", each.kind, offset))
        offset += -(-each.num_bytes // _ALIGNMENT) * _ALIGNMENT
    stream.write(bytes(-stream.tell() % _ALIGNMENT))


def _string(text: str) -> bytes:
    content = text.encode("utf-8")
    return struct.pack("<Q", len(content)) + content


def _value(value: Any) -> Iterator[bytes]:
    """Yield the number of a metadata value's type, and its bytes."""
    match value:
        case bool():
            yield struct.pack("<I?", 7, value)
        case int():
            yield struct.pack("<II", 4, value)
        case float():
            yield struct.pack("<If", 6, value)
        case str():
            yield struct.pack("<I", 8) + _string(value)
        case list():
            yield struct.pack("<IIQ", 9, 8, len(value))
            yield from map(_string, value)
        case np.ndarray():
            number = {"float32": 6, "int32": 5}[value.dtype.name]
            yield struct.pack("<IIQ", 9, number, len(value)) + value.tobytes()
