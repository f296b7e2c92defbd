"""Write files and directories so that they appear complete or not at all, and lock files.

Content goes under a hidden name beside the target, which is then renamed. A rename within one file
system is atomic, so a reader and a killed process see the old content or the new one.
"""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llamajax.errors import UserError

LOCK_WITHIN_S = 10.0  # a killed process holds its lock until its last write is done
_RETRY_LOCK_S = 0.2


@contextlib.contextmanager
def replaced_file(path: Path, *, durable: bool = False, label: str | None = None) -> Iterator[Path]:
    """Yield a hidden path to write; rename it to `path` when the block ends without an error.

    durable: force the content onto the disk before the rename. label: what the user calls the
    file; then an OSError becomes a UserError. Otherwise raises OSError.
    """
    # A random part, because processes on several hosts may write the same file.
    hidden = path.with_name(f".{path.name[:40]}.{os.urandom(4).hex()}.partial")
    try:
        yield hidden
        if durable:
            force_to_disk(hidden)
        hidden.replace(path)
    except OSError as error:
        if label is None:
            raise
        raise UserError(f"{label} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            hidden.unlink()


def remove_partials(path: Path) -> None:
    """Remove what killed processes left of `replaced_file`. To be called by the only writer."""
    pattern = f"{glob.escape(f'.{path.name[:40]}.')}{'[0-9a-f]' * 8}.partial"
    for left in path.parent.glob(pattern):
        with contextlib.suppress(OSError):
            left.unlink()


def write_file(
    path: Path, content: str | bytes, *, durable: bool = False, label: str | None = None
) -> None:
    """Write a file complete or not at all, text as UTF-8. Parameters as in `replaced_file`."""
    with replaced_file(path, durable=durable, label=label) as hidden:
        hidden.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Yield an empty hidden directory to fill; publish it as `target` when the block ends well.

    It is forced onto the disk before. Raises UserError when the disk refuses. What was at `target`
    stays if anything fails.
    """
    target = target.absolute()
    hidden, old = (target.with_name(f".{target.name}.{end}") for end in ("partial", "old"))
    try:
        shutil.rmtree(hidden, ignore_errors=True)  # of a process that was killed
        hidden.mkdir(parents=True)
        yield hidden
        for path in (*hidden.rglob("*"), hidden):
            force_to_disk(path)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        hidden.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for left in (hidden, old):
            shutil.rmtree(left, ignore_errors=True)


def force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_target(target: Path, *, overwrite: bool, needed_bytes: int) -> None:
    """Raise UserError if the directory `target` exists already or its disk has too little room."""
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


def write_problem(folder: Path) -> str | None:
    """Make a folder and write into it. Return why that fails, None where it does not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror


def undo_new_folders(folder: Path, undo: contextlib.ExitStack) -> None:
    """Make `undo` remove `folder` and those of its parents that do not exist yet.

    A folder that is not empty by then stays.
    """
    for path in reversed([f for f in (folder, *folder.parents) if not f.exists()]):
        undo.callback(_remove_empty, path)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def free_name(path: Path) -> Path:
    """Return `path`, or the first of `path.2`, `path.3`, ... that does not exist."""
    names = (path.name, *(f"{path.name}.{n}" for n in range(2, 1000)))
    return next(path.with_name(name) for name in names if not os.path.lexists(path.parent / name))


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file. UserError where there is none that can be read."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is not readable as JSON ({error}); write it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds a {type(found).__name__}, not an object; write it again")
    return found


def lfs_problem(start: bytes) -> str | None:
    """Return what is wrong with a file that starts like a git-lfs pointer, else None."""
    if not start.startswith(b"version https://git-lfs"):
        return None
    return "is a pointer of git-lfs, not the file itself; run `git lfs pull`"


def lock_file(file: IO, *, within_s: float | None = None) -> str | None:
    """Lock an open file until it is closed. Return why not, where the file system has no locks.

    The kernel's lock ends with the process, however that dies. within_s: how long to wait for
    another process that holds it (None: LOCK_WITHIN_S, seconds). Raises BlockingIOError after that.
    Other errors (ENOSYS, ENOLCK, EOPNOTSUPP of Lustre, NFS and others) say nothing about other
    processes.
    """
    deadline = time.monotonic() + (LOCK_WITHIN_S if within_s is None else within_s)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_RETRY_LOCK_S)
        except OSError as error:
            return error.strerror or str(error)
