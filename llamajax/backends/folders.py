"""Folders of the user that hold what can be made again."""

import os
from pathlib import Path


def cache_directory(name: str) -> Path:
    """The user's directory for results that can be computed again; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "llamajax" / name
