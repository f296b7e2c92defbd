"""Read the tensors of a `torch.save` file without PyTorch and without running what it pickles.

Such a file is a zip of uncompressed members: `data.pkl` describes the tensors, `data/KEY` hold
their bytes (https://pytorch.org/docs/stable/notes/serialization.html). A pickle may call any
function of any module. Here it can name only what rebuilds plain tensors, and each of these names
is replaced by a function of ours that records its arguments.
"""

import collections
import io
import mmap
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llamajax.errors import UserError
from llamajax.files import lfs_problem

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
_PICKLE_BYTES = 2**26  # of a list of tensors; that of a 405B model has less than one MB
_LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name


# Tuples: a pickle can change the attributes of what it made, but these have none that change.
class _Storage(NamedTuple):
    kind: str
    key: str
    num_values: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(pickle.UnpicklingError):
    """The pickle asks for something that no list of tensors needs."""


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return every tensor of a file by name, as read-only arrays on the mapped file.

    Raises UserError for a file in another format, damaged, or with anything else in its pickle.
    """
    try:
        with path.open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            if problem := lfs_problem(content[:100]):
                raise UserError(f"{path}: {problem}")
            if content[:2] != b"PK":
                raise UserError(
                    f"{path}: not a zip file as torch.save writes since PyTorch 1.6. If it is an "
                    "older one, load it with PyTorch where you trust it, and save it again"
                )
            with zipfile.ZipFile(stream) as archive:
                return _tensors(archive, content)
    except _Refused as error:
        raise UserError(f"{path}: {error}; only plain tensors are read, nothing is run") from None
    except UserError:
        raise
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, ValueError, KeyError,
            RuntimeError) as error:  # fmt: skip
        raise UserError(
            f"{path}: truncated or damaged ({type(error).__name__}: {error}); download it again"
        ) from error


def _tensors(archive: zipfile.ZipFile, content: mmap.mmap) -> dict[str, np.ndarray]:
    members = {name.partition("/")[2]: info for name, info in archive.NameToInfo.items()}
    if (order := members.get("byteorder")) is not None and archive.read(order) != b"little":
        raise _Refused("its numbers are big-endian")
    described = members["data.pkl"]
    _must_be_stored(described)
    if described.file_size > _PICKLE_BYTES:
        raise _Refused(f"its pickle has {described.file_size} bytes, too many for a list of names")
    found = _load(archive.read(described))
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise _Refused(f"it holds a {type(found).__name__}, not a dict of tensors by name")
    if others := [name for name, value in found.items() if not isinstance(value, _Tensor)]:
        raise _Refused(f"{others[0]!r} is not a tensor")
    return {name: _array(tensor, members, content) for name, tensor in found.items()}


def _must_be_stored(member: zipfile.ZipInfo) -> None:
    if member.compress_type != zipfile.ZIP_STORED:
        raise _Refused(f"its member {member.filename} is compressed")


def _load(described: bytes) -> Any:
    """Return what the pickle describes, with a _Tensor for each tensor."""
    allowed = _allowed_names()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in allowed:
                raise _Refused(f"its pickle asks for {module}.{name}, which is not allowed")
            return allowed[module, name]

        def persistent_load(self, pid: Any) -> _Storage:
            match pid:
                case ("storage", str(kind), str(key), _, int(num_values)) if kind in _STORAGES:
                    return _Storage(kind, key, num_values)
            raise _Refused("its pickle asks for something else than a stored tensor")

    try:
        return Unpickler(io.BytesIO(described)).load()
    except (TypeError, AttributeError, IndexError, RecursionError, MemoryError) as error:
        raise pickle.UnpicklingError(f"its pickle makes no sense: {error}") from error


def _allowed_names() -> dict[tuple[str, str], Any]:
    """Return the names that a pickle may use; new ones for each, as a pickle can change them."""

    def rebuild(storage, offset, size, stride, *_) -> _Tensor:  # requires_grad, hooks, metadata
        numbers = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or len(size) != len(stride):
            raise _Refused(f"a tensor of size {size} and strides {stride} is not plain")
        if any(type(n) is not int or n < 0 for n in numbers):
            raise _Refused(f"a tensor at {offset} of size {size} and strides {stride} is not plain")
        return _Tensor(storage, offset, tuple(size), tuple(stride))

    functions: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor_v2"): rebuild,
        ("collections", "OrderedDict"): type("OrderedDict", (collections.OrderedDict,), {}),
    }
    return functions | {("torch", name): name for name in _STORAGES}


def _array(tensor: _Tensor, members: dict[str, zipfile.ZipInfo], content: mmap.mmap) -> np.ndarray:
    """Return one tensor as a view of the mapped file."""
    storage, member = tensor.storage, members[f"data/{tensor.storage.key}"]
    _must_be_stored(member)
    header = content[member.header_offset : member.header_offset + _LOCAL_HEADER]
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = member.header_offset + _LOCAL_HEADER + names
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    used = 0 if 0 in tensor.shape else tensor.offset + last + 1
    dtype = _STORAGES[storage.kind]
    size = dtype.itemsize
    room = min(member.file_size, len(content) - start) // size
    if used > min(storage.num_values, room):
        raise ValueError(f"{member.filename} holds {room} values of the {used} that are needed")
    flat = np.frombuffer(content, dtype, used, start) if used else np.empty(0, dtype)
    strides = [n * size for n in tensor.strides]
    return np.lib.stride_tricks.as_strided(
        flat[tensor.offset :], tensor.shape, strides, writeable=False
    )
