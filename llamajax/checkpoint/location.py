"""Directories of checkpoints: on a file system, or at a URL in an object store.

A local location is a `pathlib.Path`, a remote one an `ObjectPath`, with the same methods and the
same errors. What differs is here: an object store has no rename, no fsync and no free space.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import jax

from llamajax.backends.jax_private import orbax_tensorstore
from llamajax.backends.object_stores import SCHEMES, how_to_fix, kvstore_spec
from llamajax.checkpoint.object_store import ObjectPath
from llamajax.errors import TransientError, UserError

Location = Path | ObjectPath


def is_url(text: object) -> bool:
    """Return whether this names something in an object store, not a path."""
    return "://" in str(text)


def is_remote(path: PurePath) -> bool:
    """Return whether a location is in an object store."""
    return not isinstance(path, Path)


def locate(text: str | PurePath) -> Location:
    """Return the location of a path or URL. UserError for a URL of another kind."""
    if not is_url(text):
        path = Path(text).absolute()
        return path.resolve() if ".." in path.parts else path  # TensorStore takes no ".."
    scheme, _, key = str(text).partition("://")
    if not key.strip("/"):
        raise UserError(f"{text}: there is no bucket in it; write {scheme}://BUCKET/NAME")
    if scheme not in SCHEMES:
        known = " or ".join(f"{name}://" for name in SCHEMES)
        raise UserError(f"{text}: checkpoints can be at a path or at {known}; not at {scheme}://")
    return ObjectPath(str(text))


def check_usable(path: PurePath) -> None:
    """Raise UserError for a location that Orbax or TensorStore cannot write to."""
    if is_remote(path) and (problem := orbax_tensorstore.problem()):
        raise UserError(f"{path}: {problem}; use a path, or another release of Orbax")
    bad = "a backslash" if "\\" in str(path) else None
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        bad = "bytes that are no UTF-8"
    if bad:
        raise UserError(
            f"{str(path)!r} has {bad} in it: no checkpoint can be written there; rename it"
        )


def refusal(error: OSError, path: PurePath, problem: str, fix: str = "") -> UserError:
    """Return the error for a user where `path` raised this one; TransientError if the network did.

    problem: what could not be done. fix: what helps on a disk.
    """
    text = with_rank(f"{problem}: {reason(error)}")
    if not is_remote(path):
        return UserError(f"{text}; {fix}" if fix else text)
    lasts = isinstance(error, FileNotFoundError | PermissionError)
    return (UserError if lasts else TransientError)(f"{text}; {how_to_fix(str(path))}")


def reason(error: BaseException) -> str:
    """Return the cause of a storage error on one line, in the system's words if it has some."""
    if isinstance(error, TimeoutError):
        return "another process failed, or did not finish in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    # TensorStore: `...: No space left on device [os_error_code='28']`.
    if found := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(found.group(1)))
    words = re.split(r" \[[\w -]+='", str(error), maxsplit=1)[0]  # before its attachments
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return lines[0][:300].rstrip(".") if lines else type(error).__name__


def with_rank(problem: str) -> str:
    """Put the number of this process before a problem, if there are several."""
    if jax.process_count() == 1 or problem.startswith("process "):
        return problem
    return f"process {jax.process_index()}: {problem}"


@contextlib.contextmanager
def store_errors_explained(directory: Location) -> Iterator[None]:
    """Turn the failure of an object store in this block into a UserError with the fix."""
    try:
        yield
    except OSError as error:
        if not is_remote(directory):
            raise
        raise refusal(error, directory, f"{directory} cannot be reached") from None


def tensorstore_spec(directory: PurePath) -> dict[str, Any]:
    """Return TensorStore's spec of a directory: no URL, where `%41` and `?` have a meaning."""
    if is_remote(directory):
        return kvstore_spec(f"{directory}/")
    return {"driver": "file", "path": f"{directory}/"}


def entry_names(directory: Location) -> set[str]:
    """List a directory; empty if it does not exist, or is none. Raises OSError."""
    try:
        return {path.name for path in directory.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        if is_remote(directory):
            raise  # no such bucket
        return set()


def file_sizes(directory: Location) -> dict[str, int | None]:
    """Return the bytes of every file under a directory, by relative name.

    None where an object store does not tell them: no object is there in part.
    """
    if is_remote(directory):
        return dict.fromkeys(directory.keys())
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}


def read_chunks(path: Location, num_bytes: int) -> Iterator[bytes]:
    """Read a file, this many bytes at a time."""
    if is_remote(path):
        yield from path.read_chunks(num_bytes)
        return
    with path.open("rb") as file:
        while chunk := file.read(num_bytes):
            yield chunk


def create_file(path: Location, text: str) -> bool:
    """Write a file unless it exists; return whether it was written. Raises OSError."""
    if is_remote(path):
        return path.create(text.encode())
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True
