"""etils' search of local directories, which takes brackets in a directory's name for a pattern.

Orbax collects what the processes of a save wrote with it. Under `runs/lr[1]` it finds nothing, and
commits a checkpoint that nobody can read.
"""

import glob
import os

from etils.epath import backend


def problem() -> str | None:
    """Return why paths with brackets cannot hold checkpoints; None if they can."""
    if callable(getattr(getattr(backend, "os_backend", None), "glob", None)):
        return None
    return "etils searches directories in another way than earlier releases"


def take_directories_literally() -> bool:
    """Make only the last component of a local path a pattern; False if that is not possible."""
    if problem():
        return False
    backend.os_backend.glob = _glob
    return True


def _glob(path: str | os.PathLike[str]) -> list[str]:
    directory, pattern = os.path.split(os.fspath(path))
    return glob.glob(os.path.join(glob.escape(directory), pattern))
