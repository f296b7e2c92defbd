"""Compiled programs kept on disk, so that the second start of a run does not compile.

JAX has such a cache; here are its folder, and files that survive a kill: each is written beside its
place and renamed, and carries a digest, so that several processes and killed ones leave nothing
that is read as a program. For a platform that JAX keeps no programs of, its check is answered
before it is asked (a repair, see `repairs`). Where JAX lacks the private parts that this needs
(`jax_private.cache_hook`), its own files are used, for its own platforms.

JAX writes what process 0 compiles and nothing else. On GPUs its keys are made to be the same on all
processes (read in its code, not run), which find the program if they see that folder. A CPU's key
holds the process as well, so the others compile at each start; no setting of JAX changes this.
"""

import hashlib
import os
import platform as host
from pathlib import Path
from typing import Any

import jax

from llamajax.backends.folders import cache_directory
from llamajax.backends.jax_private import cache_hook
from llamajax.files import write_file

_DIGEST_BYTES = 32
_SUFFIX = ".program"
# All programs are kept, small ones too, as a start compiles many; 10 GiB at most, the latest used.
_LEAST_COMPILE_S = 0.0
_MOST_BYTES = 10 * 2**30


def enable(folder: str, *, force: bool) -> Path | None:
    """Keep compiled programs from now on; the folder, or None where the user's JAX forbids it.

    folder: `auto` is the one of JAX_COMPILATION_CACHE_DIR, else the user's cache directory, one for
    each kind of processor, since a CPU's programs fit no other. force: also on a platform that JAX
    keeps no programs of. Call it before anything is compiled.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if folder == "auto":
        path = Path(jax.config.jax_compilation_cache_dir or _default_folder())
    else:
        path = Path(folder)
    path = path.expanduser().absolute()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_COMPILE_S)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    if not cache_hook.problem():
        cache_hook.install(_open, force=force)
    return path


def _default_folder() -> Path:
    """One folder for each kind of processor: its model and what it can do."""
    words = [host.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for key in ("model name", "flags", "Features"):
        words += [line for line in lines if line.startswith(key)][:1]
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]
    return cache_directory("programs") / digest


class FileCache:
    """Programs as files of one folder. What JAX wants of a cache: `get`, `put` and `_path`."""

    def __init__(self, folder: Path, *, most_bytes: int):
        self._path = folder
        self._most_bytes = most_bytes

    def get(self, key: str) -> bytes | None:
        """The value of a key; None where there is none, or only a damaged one (then removed)."""
        path = self._path / f"{key}{_SUFFIX}"
        try:
            stored = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        digest, value = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        if hashlib.sha256(value).digest() != digest:
            path.unlink(missing_ok=True)
            return None
        return value

    def put(self, key: str, value: bytes) -> None:
        """Keep a value, whole or not at all; the least recently used ones go to make room."""
        self._path.mkdir(parents=True, exist_ok=True)
        path = self._path / f"{key}{_SUFFIX}"
        write_file(path, hashlib.sha256(value).digest() + value)
        self._make_room()

    def _make_room(self) -> None:
        files = []
        for path in self._path.iterdir():
            try:
                files.append((path.stat(), path))
            except OSError:
                continue  # another process removed or renamed it
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda item: item[0].st_mtime):
            if total <= self._most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= stat.st_size


def _open(path: str) -> tuple[Any, str]:
    return FileCache(Path(path), most_bytes=_MOST_BYTES), path
