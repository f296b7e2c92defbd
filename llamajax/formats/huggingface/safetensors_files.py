"""The safetensors format: headers checked before reading, parts of tensors, streamed files.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and byte
range of each tensor), and the tensors' bytes in row-major order, without gaps. The safetensors
library writes only what is whole in memory and maps whole files. Here at most one tensor is held.
Specification: the README of huggingface/safetensors.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llamajax.errors import UserError
from llamajax.files import lfs_problem
from llamajax.formats.foreign_weights import Index, TensorSource

# The specification's own limit; a longer header is a damaged length.
_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _damaged(file: Path, problem: str) -> UserError:
    return UserError(f"{file} {problem}; copy or download it again")


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """Where a tensor is: `offset` in bytes from the file's start."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsSource(TensorSource):
    """The tensors of one or several safetensors files."""

    def __init__(self, places: Mapping[str, TensorPlace]):
        self._tensors = places

    def where(self, name: str) -> str:
        return str(self._tensors[name].file)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        try:
            return read_part(self._tensors[name], index)
        except OSError as error:
            raise UserError(f"cannot read {self.where(name)}: {error.strerror}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file; empty where it has none that can be read."""
    try:
        with path.open("rb") as file:
            length = min(_MAX_HEADER_BYTES, int.from_bytes(file.read(8), "little"))
            return dict(json.loads(file.read(length))["__metadata__"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def read_places(path: Path) -> dict[str, TensorPlace]:
    """Return the tensors of a file by name. UserError if it cannot be read, or is damaged."""
    try:
        with path.open("rb") as file:
            size, start = os.fstat(file.fileno()).st_size, file.read(100)
            length = int.from_bytes(start[:8], "little")
            if problem := lfs_problem(start):
                raise _damaged(path, problem)
            if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                raise _damaged(path, f"is cut off or not safetensors ({size:,} bytes)")
            file.seek(8)
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        places = {name: _place(path, spec, start=8 + length) for name, spec in header.items()}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(path, "has a header that is not that of safetensors") from None
    position = 8 + length
    for place in sorted(places.values(), key=lambda place: place.offset):
        if place.offset < position:
            raise _damaged(path, "has tensors that overlap")
        position = place.offset + place.num_bytes
    if position > size:
        raise _damaged(path, f"is cut off: it has {size:,} bytes of {position:,}")
    return places


def _place(path: Path, spec: Mapping[str, Any], *, start: int) -> TensorPlace:
    begin, end = spec["data_offsets"]
    if spec["dtype"] not in _DTYPES:
        raise _damaged(path, f"holds a tensor of unknown dtype {spec['dtype']}")
    place = TensorPlace(path, _DTYPES[spec["dtype"]], tuple(spec["shape"]), start + begin)
    if end - begin != place.num_bytes:
        raise _damaged(path, f"has a byte range {begin}..{end} for shape {list(place.shape)}")
    return place


def read_part(place: TensorPlace, index: Index | None) -> np.ndarray:
    """Read a tensor, or the part of it that `index` selects; whole rows in one go.

    Raises UserError when the file has become shorter than its header says.
    """
    shape = place.shape
    index = tuple(slice(0, n) for n in shape) if index is None else index
    whole_rows = all(s.indices(n) == (0, n, 1) for s, n in zip(index[1:], shape[1:], strict=True))
    if not shape or not whole_rows:
        mapped = np.memmap(place.file, place.dtype, "r", offset=place.offset, shape=shape)
        return np.array(mapped[index])
    start, stop, _ = index[0].indices(shape[0])
    array = np.empty((stop - start, *shape[1:]), place.dtype)
    row_bytes = math.prod(shape[1:]) * place.dtype.itemsize
    with place.file.open("rb") as file:
        file.seek(place.offset + start * row_bytes)
        if file.readinto(memoryview(array.reshape(-1).view(np.uint8))) != array.nbytes:
            raise _damaged(place.file, "ended while it was read")
    return array


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    arrays: Iterator[np.ndarray],
    **metadata: str,
) -> None:
    """Write tensors of one dtype as they come: the header first, then one after the other.

    arrays: in the order of `shapes`; as many as there are shapes are taken.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            array = next(arrays)
            assert (shape, dtype) == (array.shape, array.dtype), name
            file.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
