"""Read a GGUF file's tensors as Hugging Face tensors, dequantized slice by slice.

The file stays memory mapped. Quantized blocks are turned into float32 by the `gguf` package, an
optional extra.
"""

import dataclasses
import importlib
import math
from typing import Any

import ml_dtypes
import numpy as np

from llamajax.errors import UserError
from llamajax.formats.foreign_weights import Index, TensorSource, select
from llamajax.formats.gguf.gguf_header import GgufHeader, GgufTensor
from llamajax.formats.huggingface.hf_names import Row, interleaved_rows, renamed_tensors

_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_QUANTIZED = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S",
    "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4",
)  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"
_CHUNK_VALUES = 2**20  # dequantized at one time, so that a read costs little more than its result


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Matrix:
    shape: tuple[int, ...]
    dtype: np.dtype
    kind: Any  # gguf.GGMLQuantizationType
    block: tuple[int, int]  # values and bytes of a block
    bytes_RC: np.ndarray  # uint8 (rows, bytes a row), mapped
    order: np.ndarray | None  # stored row of each row


class GgufSource(TensorSource):
    """The tensors of one file. Quantized ones are read as float32."""

    def __init__(self, header: GgufHeader, *, num_heads: int, num_kv_heads: int) -> None:
        self._path, heads = header.path, (num_heads, num_kv_heads)
        try:
            importlib.import_module("gguf")
        except ImportError as error:
            raise UserError(
                f"{self._path}: GGUF files need the gguf package: pip install 'llamajax[gguf]'"
            ) from error
        self._tensors: dict[str, _Matrix] = renamed_tensors(
            [name for name in header.tensors if name != ROPE_FACTORS],
            Row.gguf_name,
            lambda row, name: _matrix(header, header.tensors[name], row, heads),
            path=self._path,
        )

    def where(self, name: str) -> str:
        return str(self._path)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Dequantize a tensor, with the rows of q and k half-split."""
        matrix = self._tensors[name]
        taken, rows, columns = select(matrix.shape, index)
        found = np.empty((len(rows), len(columns)), matrix.dtype)
        step = max(1, _CHUNK_VALUES // max(1, len(columns)))
        for start in range(0, len(rows), step):
            found[start : start + step] = _values(matrix, rows[start : start + step], columns)
        return found.reshape(taken)


def _matrix(header: GgufHeader, tensor: GgufTensor, row: Row, heads: tuple[int, int]) -> _Matrix:
    """Return the mapped bytes of one tensor. ValueError says why it cannot be read."""
    import gguf

    known = {kind.value: kind for kind in gguf.GGMLQuantizationType}
    kind = known.get(tensor.type_id)
    name = f"number {tensor.type_id}" if kind is None else kind.name
    if name not in _PLAIN and name not in _QUANTIZED:
        types = ", ".join([*_PLAIN, *_QUANTIZED])
        raise ValueError(f"type {name} cannot be read, only {types}")
    values, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = tensor.shape if len(tensor.shape) == 2 else (1, math.prod(tensor.shape))
    order = interleaved_rows(row, rows, heads)
    if columns % values:
        raise ValueError(f"rows of {columns} values are no whole blocks of {values}")
    row_bytes = columns // values * size
    if tensor.start + rows * row_bytes > len(header.content):
        raise ValueError(f"ends after the file ({len(header.content)} bytes): truncated")
    mapped = np.frombuffer(header.content, np.uint8, rows * row_bytes, tensor.start)
    return _Matrix(
        shape=tensor.shape,
        dtype=np.dtype(_PLAIN.get(name, np.float32)),
        kind=kind,
        block=(values, size),
        bytes_RC=mapped.reshape(rows, row_bytes),
        order=order,
    )


def _values(matrix: _Matrix, rows: range, columns: range) -> np.ndarray:
    """Return values (rows, columns): whole blocks are dequantized, and cut to size."""
    values, size = matrix.block
    first, last = columns.start // values, -(-columns.stop // values)
    picked = slice(rows.start, rows.stop)
    picked = picked if matrix.order is None else matrix.order[picked]
    found = np.ascontiguousarray(matrix.bytes_RC[picked, first * size : last * size])
    if matrix.kind.name in _PLAIN:
        return found.view(matrix.dtype)
    import gguf

    cut = slice(columns.start - first * values, columns.stop - first * values)
    return gguf.dequantize(found, matrix.kind)[:, cut]
