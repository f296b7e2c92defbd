"""Directories of checkpoints: on a file system, or at a URL in an object store.

A local location is a `pathlib.Path`, a remote one an `etils.epath.Path`, with the same methods.
What differs is here: an object store has no rename, no fsync and no free space, and it fails with
the exceptions of its client library.
"""

import asyncio
import contextlib
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import jax
from etils import epath

from llamajax.errors import TransientError, UserError

_SCHEME, _CLIENT = "gs", "gcsfs"  # of URLs, and the module of the client library
# What a user can check when an object store refuses.
FIX = (
    "check the bucket's name, the network, and the credentials (`gcloud auth application-default "
    "login` or GOOGLE_APPLICATION_CREDENTIALS)"
)
# TensorStore's own default retries for a quarter of an hour, and the next save would wait for that.
RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "8s"}

Location = Path | epath.Path


def is_url(text: object) -> bool:
    """Return whether this names something in an object store, not a path."""
    return "://" in str(text)


def is_remote(path: PurePath) -> bool:
    """Return whether a location is in an object store."""
    return not isinstance(path, Path)


def locate(text: str | PurePath) -> Location:
    """Return the location of a path or URL. UserError if its client library is not installed."""
    if not is_url(text):
        return Path(text).absolute()
    scheme = str(text).partition("://")[0]
    if scheme != _SCHEME:
        raise UserError(
            f"{text}: checkpoints can be at a path or at {_SCHEME}://; not at {scheme}://"
        )
    try:
        importlib.import_module(_CLIENT)
    except ImportError as error:
        raise UserError(f"{text}: {error}; run: pip install 'llamajax[gcs]'") from None
    # Orbax and TensorStore do not write through fsspec, whose cached listings would become wrong.
    import fsspec

    for name in fsspec.get_filesystem_class(scheme).protocol:
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    return epath.Path(str(text).rstrip("/"))


def check_usable(path: PurePath) -> None:
    """Raise UserError for a path under which TensorStore cannot write."""
    bad = "a backslash" if "\\" in str(path) else None
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        bad = "bytes that are no UTF-8"
    if bad:
        raise UserError(
            f"{str(path)!r} has {bad} in it: no checkpoint can be written there; rename it"
        )


def storage_errors(path: PurePath) -> tuple[type[Exception], ...]:
    """Return the exceptions that mean: the disk or the object store refused, not the program."""
    if not is_remote(path):
        return (OSError,)
    import aiohttp
    import gcsfs.retry
    import google.auth.exceptions
    import requests

    return (
        OSError,
        asyncio.TimeoutError,
        aiohttp.ClientError,
        requests.RequestException,
        gcsfs.retry.HttpError,
        google.auth.exceptions.GoogleAuthError,
    )


def user_error_type(error: BaseException, path: PurePath) -> type[UserError]:
    """Return the error class for one of `storage_errors`; TransientError if the network failed."""
    if not is_remote(path):
        return UserError
    import google.auth.exceptions as google

    if isinstance(error, google.GoogleAuthError):
        return TransientError if isinstance(error, google.TransportError) else UserError
    # gcsfs makes a plain OSError of 403.
    denied = isinstance(error, FileNotFoundError | PermissionError) or "Forbidden" in str(error)
    denied |= getattr(error, "code", None) in (400, 401, 403, 404)
    return UserError if denied else TransientError


def reason(error: BaseException) -> str:
    """Return the cause of a storage error on one line, in the system's words if it has some."""
    if isinstance(error, TimeoutError):
        return "another process failed, or did not finish in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    # TensorStore: `...: No space left on device [os_error_code='28']`.
    if found := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(found.group(1)))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


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
    except storage_errors(directory) as error:
        if not is_remote(directory):
            raise
        problem = with_rank(f"{directory} cannot be reached: {reason(error)}")
        raise user_error_type(error, directory)(f"{problem}; {FIX}") from None


def tensorstore_spec(directory: PurePath) -> dict[str, Any]:
    """Return TensorStore's spec of a directory: no URL, where `%41` and `?` have a meaning."""
    if not is_remote(directory):
        return {"driver": "file", "path": f"{directory}/"}
    bucket, _, key = str(directory).partition("://")[2].partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{key}/", "gcs_request_retries": RETRIES}


def _filesystem(path: PurePath) -> tuple[Any, str]:
    """Return fsspec's file system of a remote location, and the name of the location there."""
    import fsspec

    return fsspec.core.url_to_fs(str(path))


def entry_names(directory: Location) -> set[str]:
    """List a directory; empty if it does not exist. Raises one of `storage_errors`.

    fsspec's `exists` and `isdir` return False when the network fails. What does not exist may be
    removed or passed over, so those two are not used.
    """
    try:
        return {path.name for path in directory.iterdir()}
    except FileNotFoundError:
        return set()


def is_directory(path: Location) -> bool:
    """Return whether a directory exists; in an object store: whether it has any object."""
    return bool(entry_names(path)) if is_remote(path) else path.is_dir()


def file_sizes(directory: Location) -> dict[str, int]:
    """Return the bytes of every file under a directory, by relative name."""
    if not is_remote(directory):
        paths = (path for path in directory.rglob("*") if path.is_file())
        return {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}
    fs, root = _filesystem(directory)
    found = fs.find(root, detail=True)
    return {
        name.removeprefix(f"{root}/"): entry["size"]
        for name, entry in found.items()
        if entry["type"] == "file"
    }


def create_file(path: Location, text: str) -> bool:
    """Write a file unless it exists; return whether it was written. Raises `storage_errors`."""
    try:
        if is_remote(path):
            fs, name = _filesystem(path)
            fs.pipe_file(name, text.encode(), mode="create")
        else:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except FileExistsError:
        return False
    return True


def remove_tree(directory: Location) -> None:
    """Delete everything under a remote directory. Raises one of `storage_errors`."""
    fs, root = _filesystem(directory)
    if found := fs.find(root):
        fs.rm(found)
