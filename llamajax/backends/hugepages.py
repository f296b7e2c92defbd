"""Large pages for the memory of a process that computes on the CPU.

Every step XLA's CPU backend takes fresh memory for its temporaries, hundreds of megabytes, and
gives it back. In pages of 4 KiB the kernel then spends a fifth of a step on faults; glibc can ask
for pages of 2 MiB instead, but reads that setting only when a process starts. No jax here: this
runs before it is imported.
"""

import contextlib
import os
import re
import sys
from pathlib import Path

_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_VARIABLE, _NAME = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_FIRST_GLIBC = (2, 35)  # the first that knows the setting


def with_huge_pages() -> None:
    """Start this very command again, in this process, with glibc asking for huge pages.

    For the `__main__` of a command, before anything is imported that takes time: the process keeps
    its id, the new start costs a few hundredths of a second. Does nothing where it would not help:
    no glibc of 2.35 or later, a kernel that gives huge pages always or never, or a
    `glibc.malloc.hugetlb` of the user's own (0 turns this off).
    """
    mode, libc = "", None
    with contextlib.suppress(OSError, ValueError):
        mode = _MODE.read_text(encoding="ascii")
        libc = os.confstr("CS_GNU_LIBC_VERSION")
    wanted = _tunables(os.environ.get(_VARIABLE, ""), mode=mode, libc=libc or "")
    if wanted is not None:
        os.execve(sys.executable, sys.orig_argv, dict(os.environ) | {_VARIABLE: wanted})


def _tunables(present: str, *, mode: str, libc: str) -> str | None:
    """Return the variable to start again with; None where that would not help.

    mode: as the kernel writes it, `always [madvise] never`. libc: such as `glibc 2.36`.
    """
    version = re.match(r"glibc (\d+)\.(\d+)", libc)
    if version is None or tuple(map(int, version.groups())) < _FIRST_GLIBC:
        return None
    if _NAME in present or "[madvise]" not in mode:
        return None
    return ":".join(filter(None, (present, f"{_NAME}=1")))
