"""Where checkpoints lie: a directory of a file system, or a URL of an object store.

A local place is a `pathlib.Path`, a remote one an `etils.epath.Path`; both are walked with the same
methods. What differs is here: an object store has no rename, no fsync, no free space, and fails
with exceptions of its client library.
"""

import asyncio
import importlib
import os
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import fsspec
from etils import epath

from llamajax.errors import TransientError, UserError

# Scheme -> module of the client library, the extra that installs it, where credentials come from.
_CLIENTS = {
    "gs": (
        "gcsfs",
        "gcs",
        "`gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS",
    ),
}
# TensorStore's own default goes on for a quarter of an hour, and the next save would wait for it.
RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "8s"}

Place = Path | epath.Path


def is_url(text: object) -> bool:
    """Whether this names something in an object store, and not a path."""
    return "://" in str(text)


def is_remote(path: PurePath) -> bool:
    """Whether a place is in an object store."""
    return not isinstance(path, Path)


def place(text: str | PurePath) -> Place:
    """The place that a path or URL names. UserError when its client library is not installed."""
    if not is_url(text):
        return Path(text).absolute()
    scheme = str(text).partition("://")[0]
    if scheme not in _CLIENTS:
        known = ", ".join(f"{name}://" for name in _CLIENTS)
        raise UserError(f"{text}: checkpoints can be at a path or at {known}; not at {scheme}://")
    module, extra, _ = _CLIENTS[scheme]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{text}: {error}; run: pip install 'llamajax[{extra}]'") from None
    # Orbax and TensorStore write past fsspec, whose remembered listings would then be wrong.
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


def failures(path: PurePath) -> tuple[type[Exception], ...]:
    """What reading or writing at a place raises where the machine is to blame."""
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


def error_type(error: BaseException, path: PurePath) -> type[UserError]:
    """Return what one of `failures` is to the user: TransientError where the network failed."""
    if not is_remote(path):
        return UserError
    import google.auth.exceptions as google

    if isinstance(error, google.GoogleAuthError):
        return TransientError if isinstance(error, google.TransportError) else UserError
    # gcsfs makes a plain OSError of 403.
    denied = isinstance(error, FileNotFoundError | PermissionError) or "Forbidden" in str(error)
    denied |= getattr(error, "code", None) in (400, 401, 403, 404)
    return UserError if denied else TransientError


def how_to_mend(path: PurePath) -> str:
    """What a user can set where an object store refuses."""
    scheme = str(path).partition("://")[0]
    return f"check the bucket's name, the network, and the credentials ({_CLIENTS[scheme][2]})"


def kvstore(directory: PurePath) -> dict[str, Any]:
    """TensorStore's name of a directory; a path and no URL, in which `%41` and `?` mean more."""
    if not is_remote(directory):
        return {"driver": "file", "path": f"{directory}/"}
    bucket, _, key = str(directory).partition("://")[2].partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{key}/", "gcs_request_retries": RETRIES}


def names(directory: Place) -> set[str]:
    """What is in a directory, none where it is not there. Raises one of `failures`.

    fsspec's `exists` and `isdir` answer no where the network fails, and what is not there may be
    removed or passed over; so these are never asked.
    """
    try:
        return {path.name for path in directory.iterdir()}
    except FileNotFoundError:
        return set()


def is_directory(path: Place) -> bool:
    """Whether there is such a directory; of an object store: one with something in it."""
    return bool(names(path)) if is_remote(path) else path.is_dir()


def files(directory: Place) -> dict[str, int]:
    """Bytes of every file under a directory, by relative name."""
    if not is_remote(directory):
        paths = (path for path in directory.rglob("*") if path.is_file())
        return {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}
    fs, root = fsspec.core.url_to_fs(str(directory))
    found = fs.find(root, detail=True)
    return {
        name.removeprefix(f"{root}/"): entry["size"]
        for name, entry in found.items()
        if entry["type"] == "file"
    }


def sizes(directory: Place, names: Iterable[str]) -> dict[str, int]:
    """Bytes of the named files under a directory, of those that are there."""
    if is_remote(directory):
        found = files(directory)  # one listing instead of a question for each
        return {name: found[name] for name in names if name in found}
    there = (name for name in names if (directory / name).is_file())
    return {name: (directory / name).stat().st_size for name in there}


def create(path: Place, text: str) -> bool:
    """Write a file that is not there yet; False where it is. Raises one of `failures`."""
    try:
        if is_remote(path):
            fs, name = fsspec.core.url_to_fs(str(path))
            fs.pipe_file(name, text.encode(), mode="create")
        else:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except FileExistsError:
        return False
    return True


def remove_tree(directory: Place) -> None:
    """Delete everything under a remote directory. Raises one of `failures`."""
    fs, root = fsspec.core.url_to_fs(str(directory))
    if found := fs.find(root):
        fs.rm(found)
