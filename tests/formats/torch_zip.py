"""Writes tensors in the format of torch.save, without torch.

A zip of stored members: `data.pkl` names storages, offsets, sizes and strides; `data/KEY` are
bytes. The pickle refers to names of the module torch, which stand-ins have here.
"""

import io
import math
import pickle
import types
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def _stand_in(module: str, *names: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{n: type(n, (), {"__module__": module}) for n in names})


_TORCH = _stand_in("torch", *_STORAGES.values(), "LongStorage")
_UTILS = _stand_in("torch._utils", "_rebuild_tensor_v2")


class Tensor:
    """One tensor of a pickle: `values` numbers of `kind` under `key`, and the part of them."""

    def __init__(self, key: str, offset, size, stride, *, values=4, kind="FloatStorage") -> None:
        storage = ("storage", getattr(_TORCH, kind), key, "cpu", values)
        self._arguments = (storage, offset, size, stride, False, OrderedDict())

    def __reduce__(self):
        return _UTILS._rebuild_tensor_v2, self._arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing: Any) -> Any:
        is_storage = isinstance(thing, tuple) and thing[:1] == ("storage",)
        return thing if is_storage else None


def pickled(thing: Any) -> bytes:
    """The pickle of tensors by name."""
    stream = io.BytesIO()
    with mock.patch.dict("sys.modules", {"torch": _TORCH, "torch._utils": _UTILS}):
        _Pickler(stream, protocol=2).dump(thing)
    return stream.getvalue()


def write_zip(path: Path, described: bytes, members: Mapping[str, bytes], **options: Any) -> Path:
    """Write the zip file of a pickle and its members."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", described)
        archive.writestr("archive/byteorder", b"little")
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
        archive.writestr("archive/version", b"3\n")
    return path


def save(found: Mapping[str, Any], path: Path) -> Path:
    """Write arrays by name; what is no array is pickled as it is."""
    tensors, members = OrderedDict(), {}
    for name, array in found.items():
        tensors[name] = array
        if isinstance(array, np.ndarray):
            key, kind = str(len(members)), _STORAGES[array.dtype.name]
            members[f"data/{key}"] = array.tobytes()
            strides = tuple(math.prod(array.shape[i + 1 :]) for i in range(array.ndim))
            tensors[name] = Tensor(key, 0, array.shape, strides, values=array.size, kind=kind)
    return write_zip(path, pickled(tensors), members)
