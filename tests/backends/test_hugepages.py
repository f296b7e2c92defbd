"""Huge pages: when a command is started again, and that it is the same command then."""

import json
import os
import subprocess
import sys

import pytest

from llamajax.backends.hugepages import _tunables

MADVISE = "always [madvise] never\n"
WANTED = "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    ("present", "mode", "libc", "wanted"),
    [
        ("", MADVISE, "glibc 2.35", WANTED),
        ("glibc.malloc.check=1", MADVISE, "glibc 2.36", f"glibc.malloc.check=1:{WANTED}"),
        ("glibc.malloc.hugetlb=0", MADVISE, "glibc 2.36", None),  # the user's own choice
        ("", "[always] madvise never\n", "glibc 2.36", None),
        ("", "always madvise [never]\n", "glibc 2.36", None),
        ("", "", "glibc 2.36", None),  # no such file
        ("", MADVISE, "glibc 2.34", None),
        ("", MADVISE, "", None),  # musl
    ],
)
def test_when_a_command_starts_again(present, mode, libc, wanted):
    assert _tunables(present, mode=mode, libc=libc) == wanted


def test_the_second_start_is_the_same_command_in_the_same_process(tmp_path):
    script, mode = tmp_path / "command.py", tmp_path / "mode"
    mode.write_text(MADVISE)
    script.write_text(
        "import json, os, pathlib, sys\n"
        "from llamajax.backends import hugepages\n"
        "print(os.getpid(), flush=True)\n"
        f"hugepages._MODE = pathlib.Path({str(mode)!r})\n"
        "os.confstr = lambda _: 'glibc 2.36'\n"
        "hugepages.with_huge_pages()\n"
        "print(json.dumps([os.environ['GLIBC_TUNABLES'], sys.argv[1:], 'jax' in sys.modules]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, str(script), "a b", "--x=1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, second, last = done.stdout.splitlines()
    assert first == second
    assert json.loads(last) == [WANTED, ["a b", "--x=1"], False]
