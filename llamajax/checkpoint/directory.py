"""A directory that appears whole or not at all: written under a hidden name beside its place."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llamajax.errors import UserError


def check_target(target: Path, *, overwrite: bool, needed_bytes: int) -> None:
    """Raise UserError when `target` is there already, or the disk has too little room for it."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; name a directory to write")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"{target} exists already; name another directory, or pass --overwrite")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise UserError(f"{target} cannot be written: no permission to write in {parent}")
    free = shutil.disk_usage(parent).free
    if needed_bytes > free:
        raise UserError(
            f"{target} needs {needed_bytes:,} bytes, and that disk has {free:,} free; make room, "
            "or name a directory on another one"
        )


def undo_folders(folder: Path, undo: contextlib.ExitStack) -> None:
    """Have `undo` remove `folder` and its parents if they do not exist now and are empty then."""
    for path in reversed([f for f in (folder, *folder.parents) if not f.exists()]):
        undo.callback(_remove_empty, path)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """An empty hidden directory to write into; renamed to `target` when all went well.

    What was there before gives way at that moment, and stays if anything failed. Raises UserError
    when the disk refuses.
    """
    target = target.absolute()
    hidden, old = (target.with_name(f".{target.name}.{word}") for word in ("partial", "old"))
    try:
        try:
            shutil.rmtree(hidden, ignore_errors=True)  # of a run that was killed
            hidden.mkdir(parents=True)
            yield hidden
            _to_disk(hidden)
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            hidden.rename(target)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _to_disk(directory: Path) -> None:
    """Force every file and directory from the page cache onto the disk."""
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
