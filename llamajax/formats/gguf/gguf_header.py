"""Read the header of a GGUF file: its metadata and where its tensors are.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
`gguf.GGUFReader` reads it too, but makes three NumPy arrays of each token and merge: 7 seconds for
49,000 tokens, against a tenth of one here. Dequantization is left to that package.
"""

import dataclasses
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.errors import UserError
from llamajax.files import lfs_problem

MAGIC = b"GGUF"
# Number of a metadata type -> the format of `struct`.
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_ALIGNMENT = 32


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Name, shape (slowest dim first), the number of ggml's type, and where its bytes start."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    start: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """`metadata` has Python values, lists of strings, and NumPy arrays of numbers."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    content: mmap.mmap


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file, which stays mapped. UserError if it is none, or damaged."""
    with path.open("rb") as stream:
        start = stream.read(100)
        if start[:4] != MAGIC:
            other = f"not a GGUF file: it starts with {start[:4]!r}, not {MAGIC!r}"
            raise UserError(f"{path}: {lfs_problem(start) or other}")
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    version = int.from_bytes(content[4:8], "little")
    if version not in (2, 3):
        raise UserError(
            f"{path}: GGUF version {version}; little-endian files of versions 2 and 3 can be read"
        )
    try:
        return _parse(path, content)
    except (ValueError, KeyError) as error:
        why = str(error) if isinstance(error, ValueError) else f"there is no type {error}"
        raise UserError(f"{path}: truncated or damaged: {why}; download it again") from error


def _parse(path: Path, content: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(content, 8)
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    described = []
    for _ in range(num_tensors):
        name, num_dims = cursor.string(), cursor.number("I")
        shape = tuple(cursor.number("Q") for _ in range(num_dims))[::-1]
        described.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment = {alignment}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {
        name: GgufTensor(name, shape, type_id, start + offset)
        for name, shape, type_id, offset in described
    }
    return GgufHeader(path=path, metadata=metadata, tensors=tensors, content=content)


class _Cursor:
    """Reads values one after another; ValueError where the file ends before them."""

    def __init__(self, content: mmap.mmap, at: int) -> None:
        self._content = content
        self.at = at

    def _advance(self, size: int) -> int:
        """Step over `size` bytes; return where they start."""
        if size > len(self._content) - self.at:
            raise ValueError(f"its header goes on after its end, byte {len(self._content)}")
        self.at += size
        return self.at - size

    def number(self, code: str) -> Any:
        start = self._advance(struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{code}", self._content, start)[0]

    def string(self) -> str:
        start = self._advance(self.number("Q"))
        return self._content[start : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _FLOAT32:  # its shortest decimal: 1e-5 instead of 9.999999747e-06
            return float(str(np.float32(self.number("f"))))
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        kind, length = self.number("I"), self.number("Q")
        if kind in (_STRING, _ARRAY):
            return [self.value(kind) for _ in range(length)]
        dtype = np.dtype(_NUMBERS[kind]).newbyteorder("<")
        start = self._advance(length * dtype.itemsize)
        return np.frombuffer(self._content, dtype, length, start).copy()
