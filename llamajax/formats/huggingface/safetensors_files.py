"""The safetensors format: headers checked before reading, parts of tensors, streamed files.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and byte
range of each tensor), and the tensors' bytes in row-major order, without gaps. The safetensors
library writes only what is whole in memory and maps whole files; here no more than one tensor is.
Specification: the README of huggingface/safetensors.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from llamajax.files import lfs_problem
from llamajax.formats.foreign_weights import Index

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


class DamagedFile(Exception):
    """A file is not safetensors, or not all of it; the message says what is wrong, not where."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor stands in a file: `offset` in bytes from the file's start."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name. Raises DamagedFile; OSError when it cannot be read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if problem := lfs_problem(file.read(100)):
            raise DamagedFile(problem)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise DamagedFile(f"is cut off or not safetensors ({size:,} bytes)")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: _entry(spec, start=8 + length) for name, spec in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedFile("has a header that is not that of safetensors") from None
    _check_ranges(entries, start=8 + length, size=size)
    return entries


def _entry(spec: Mapping[str, Any], *, start: int) -> Entry:
    begin, end = spec["data_offsets"]
    if spec["dtype"] not in _DTYPES:
        raise DamagedFile(f"holds a tensor of unknown dtype {spec['dtype']}")
    entry = Entry(_DTYPES[spec["dtype"]], tuple(spec["shape"]), start + begin)
    if end - begin != _num_bytes(entry.dtype, entry.shape):
        raise DamagedFile(f"has a byte range {begin}..{end} for shape {list(entry.shape)}")
    return entry


def _num_bytes(dtype: np.dtype, shape: Sequence[int]) -> int:
    return math.prod(shape) * dtype.itemsize


def _check_ranges(entries: Mapping[str, Entry], *, start: int, size: int) -> None:
    position = start
    for entry in sorted(entries.values(), key=lambda e: e.offset):
        if entry.offset < position:
            raise DamagedFile("has tensors that overlap")
        position = entry.offset + _num_bytes(entry.dtype, entry.shape)
    if position > size:
        raise DamagedFile(f"is cut off: it has {size:,} bytes of {position:,}")


def read_part(path: Path, entry: Entry, index: Index | None) -> np.ndarray:
    """A tensor, or the part of it that `index` selects; whole rows are read in one go.

    Raises DamagedFile when the file has become shorter than its header says.
    """
    index = tuple(slice(0, n) for n in entry.shape) if index is None else index
    whole_rows = all(
        s.indices(n) == (0, n, 1) for s, n in zip(index[1:], entry.shape[1:], strict=True)
    )
    if not entry.shape or not whole_rows:
        mapped = np.memmap(path, entry.dtype, "r", offset=entry.offset, shape=entry.shape)
        return np.array(mapped[index])
    start, stop, _ = index[0].indices(entry.shape[0])
    array = np.empty((stop - start, *entry.shape[1:]), entry.dtype)
    row_bytes = _num_bytes(entry.dtype, entry.shape[1:])
    with path.open("rb", buffering=0) as file:
        file.seek(entry.offset + start * row_bytes)
        _read_into(file, array)
    return array


def _read_into(file: BinaryIO, array: np.ndarray) -> None:
    view = memoryview(array.reshape(-1).view(np.uint8))
    while view:
        count = file.readinto(view)
        if not count:
            raise DamagedFile("ended while it was read")
        view = view[count:]


def write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    arrays: Iterator[np.ndarray],
) -> None:
    """Write tensors of one dtype as they come: the header first, then one after the other.

    arrays: in the order of `shapes`; as many as there are shapes are taken.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + _num_bytes(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    with path.open("wb", buffering=0) as file:
        _write(file, np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8))
        for name, shape in shapes.items():
            array = next(arrays)
            assert (shape, dtype) == (array.shape, array.dtype), name
            _write(file, np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _write(file: BinaryIO, data: np.ndarray) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
