"""Paths at gs:// and s3://, for us and for Orbax, over TensorStore's clients of both.

There are objects and prefixes, no directories: what has an object below it exists. Errors are those
of a disk. FileNotFoundError: the object or the bucket does not exist. PermissionError: the store
refuses, and will again. ConnectionError: it cannot be reached, or fails.
"""

import errno
import fnmatch
import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from llamajax.backends.object_stores import SCHEMES, kvstore_spec

# TensorStore's status after its last retry, and those that a later attempt may not have.
_PASSING = ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED")


@epath.register_path_cls(tuple(f"{scheme}://" for scheme in SCHEMES))
class ObjectPath(epath.Path):
    """An object in a store, or all objects below it."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)  # pathlib drops the second slash

    @property
    def _object(self) -> tuple[Any, str]:
        """TensorStore's store of the bucket, and the key in it."""
        scheme, bucket, *key = self.parts
        return _open(json.dumps(kvstore_spec(f"{scheme}//{bucket}/"))), "/".join(key)

    def keys(self) -> list[str]:
        """List all objects below this path, by their names relative to it."""
        import tensorstore as ts

        store, key = self._object
        prefix, stop = (f"{key}/", f"{key}0") if key else ("", "")  # 0 comes after /
        found = [name.decode() for name in result(store.list(ts.KvStore.KeyRange(prefix, stop)))]
        # Not every service cuts a list at the end of the range. The prefix alone is a folder that a
        # console shows.
        names = (name.removeprefix(prefix) for name in found if name.startswith(prefix))
        return sorted(filter(None, names))

    def exists(self) -> bool:
        store, key = self._object
        # The list comes first: a refusal of the other request (HEAD) has no words.
        return self.is_dir() or result(store.read(key, byte_range=slice(0, 0))).state == "value"

    def is_dir(self) -> bool:
        """Return whether any object is below this path."""
        return bool(self.keys())

    def iterdir(self) -> Iterator["ObjectPath"]:
        return (self / name for name in sorted({key.partition("/")[0] for key in self.keys()}))

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def mkdir(self, mode: Any = None, parents: bool = False, exist_ok: bool = False) -> None:
        if not exist_ok and self.exists():
            raise FileExistsError(errno.EEXIST, "there is already", str(self))

    def read_bytes(self) -> bytes:
        return self._range(0, None) or b""

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode()

    def read_chunks(self, num_bytes: int) -> Iterator[bytes]:
        """Read an object in ranges of this many bytes. TensorStore does not tell its size."""
        for start in itertools.count(0, num_bytes):
            if (found := self._range(start, start + num_bytes)) is None:
                yield self._range(start, None) or b""
                return
            yield found

    def _range(self, start: int, stop: int | None) -> bytes | None:
        """Read a range of bytes; None where the object ends before it does."""
        store, key = self._object
        try:
            found = store.read(key, byte_range=slice(start, stop)).result()
        except ValueError as error:
            if str(error).startswith("OUT_OF_RANGE"):
                return None
            raise as_os_error(error) from None
        if found.state != "value":
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self))
        return found.value

    def write_bytes(self, data: bytes) -> int:
        store, key = self._object
        result(store.write(key, data))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode())

    def create(self, data: bytes) -> bool:
        """Write an object unless it exists, also against other processes; return whether it was."""
        store, key = self._object
        found = result(store.read(key))
        if found.state != "missing":
            return False
        if result(store.write(key, data, if_equal=found.stamp.generation)).generation:
            return True
        if result(store.read(key)).state == "missing":  # what TensorStore makes of 404
            raise FileNotFoundError(f"there is no bucket {self.parts[1]}")
        return False

    def unlink(self, missing_ok: bool = True) -> None:
        store, key = self._object
        result(store.write(key, None))

    def rmtree(self, missing_ok: bool = True) -> None:
        store, key = self._object
        for removal in [store.write(f"{key}/{name}", None) for name in self.keys()]:
            result(removal)


@functools.cache
def _open(spec: str) -> Any:
    import tensorstore as ts  # takes long, and is not needed for a path on a disk

    try:
        return ts.KvStore.open(json.loads(spec)).result()
    except ValueError as error:  # a name that no bucket can have, or an endpoint that is no URL
        raise as_os_error(error) from None


def result(future: Any) -> Any:
    """Wait for TensorStore. Its error becomes the OSError that a disk would raise."""
    try:
        return future.result()
    except (ValueError, NotImplementedError) as error:
        raise as_os_error(error) from None


def as_os_error(error: Exception) -> OSError:
    """Return the OSError for an error of TensorStore's, `STATUS: CODE OF THE STORE: words`."""
    text = str(error).partition(" [")[0]  # before the response in full
    status, _, words = text.partition(": ")
    if status == "NOT_FOUND":
        return FileNotFoundError(words)
    if status in _PASSING:
        return ConnectionError(words)
    return PermissionError(words if status.isupper() else text)
