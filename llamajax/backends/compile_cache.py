"""Compiled programs kept on disk, so that the second start of a run does not compile.

JAX has such a cache, with files of its own. Ours take their place, because a kill must cost
nothing: JAX writes a program in place and never replaces half of one, so it compiles that program
at every start from then on. With `jax_compilation_cache_max_size` it also reads one file for each
program kept whenever it adds one (50 ms at 1000 programs), needs the package filelock, and in jax
0.10 adds none any more after a kill between its two writes. Where JAX lacks the private parts that
this needs (`jax_private.cache_hook`), its own files are used, for its own platforms.

JAX writes what process 0 compiles and nothing else. On GPUs its keys are made to be the same on all
processes (read in its code, not run), which find the program if they see that folder. A CPU's key
holds the process as well, so the others compile at each start; no setting of JAX changes this.
"""

import contextlib
import hashlib
import os
import platform as host
from pathlib import Path

import jax

from llamajax.backends.jax_private import cache_hook
from llamajax.errors import say
from llamajax.files import write_file, write_problem

_DIGEST_BYTES = 32
_SUFFIX = ".program"
# All programs are kept, small ones too, as a start compiles many.
_LEAST_COMPILE_S = 0.0
_NO_HOME = "/dev/null/no home directory"  # nothing can be made there
_MOST_BYTES = 10 * 2**30


def cache_directory(name: str) -> Path:
    """Return the user's directory for what can be computed again.

    It may not exist yet, and a user may have no folder to make it in.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(_NO_HOME if base.startswith("~") else base) / "llamajax" / name


def enable(folder: str, *, force: bool) -> Path | None:
    """Keep compiled programs from now on. Return the folder.

    None where the user's JAX forbids it, and with a warning where nothing can be written.

    folder: `auto` is the one of JAX_COMPILATION_CACHE_DIR, else the user's cache directory, one for
    each kind of processor, since a CPU's programs fit no other. force: also on a platform that JAX
    keeps no programs of. Call it before anything is compiled.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    path = Path(folder)
    if folder == "auto":
        path = Path(jax.config.jax_compilation_cache_dir or _default_folder())
    path = path.expanduser().absolute()
    if problem := write_problem(path):
        say(
            f"warning: compiled programs are not kept: {path}: {problem}; set XDG_CACHE_HOME or "
            "backend.compile_cache to a folder that can be written"
        )
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_COMPILE_S)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    if not cache_hook.problem():
        cache_hook.install(lambda path: (FileCache(Path(path)), path), force=force)
    return path


def _default_folder() -> Path:
    """Return a folder for this kind of processor: its model and what it can do."""
    lines = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    words = [host.machine()]
    for key in ("model name", "flags", "Features"):
        words += [line for line in lines if line.startswith(key)][:1]
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]
    return cache_directory("programs") / digest


class FileCache:
    """Programs as files of one folder, each with its digest; JAX wants `get`, `put` and `_path`.

    The least recently used files beyond `most_bytes` are removed when the cache is opened; those
    that killed processes left half written are among them.
    """

    def __init__(self, folder: Path, *, most_bytes: int = _MOST_BYTES):
        self._path = folder
        files = []
        for path in folder.glob(f"*{_SUFFIX}*"):
            with contextlib.suppress(OSError):  # another process removed it
                files.append((path.stat(), path))
        total = 0
        for stat, path in sorted(files, key=lambda item: -item[0].st_mtime):
            total += stat.st_size
            if total > most_bytes:
                path.unlink(missing_ok=True)

    def get(self, key: str) -> bytes | None:
        """Return the value of a key; None where there is none, or a damaged one, then removed."""
        path = self._path / f"{key}{_SUFFIX}"
        try:
            stored = path.read_bytes()
            os.utime(path)  # it was used now
        except OSError:
            return None
        digest, value = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        if hashlib.sha256(value).digest() != digest:
            path.unlink(missing_ok=True)
            return None
        return value

    def put(self, key: str, value: bytes) -> None:
        """Keep a value, complete or not at all."""
        self._path.mkdir(parents=True, exist_ok=True)
        write_file(self._path / f"{key}{_SUFFIX}", hashlib.sha256(value).digest() + value)
