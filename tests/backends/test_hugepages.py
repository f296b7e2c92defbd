"""Huge pages: when a command is started again, and that it is the same command then."""

import json
import os
import subprocess
import sys

import pytest

from llamajax.backends.hugepages import _tunables

MADVISE = "always [madvise] never\n"


@pytest.mark.parametrize(
    ("present", "mode", "glibc", "wanted"),
    [
        ("", MADVISE, (2, 35), "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", MADVISE, (2, 36), "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", MADVISE, (2, 36), None),  # the user's own choice
        ("", "[always] madvise never\n", (2, 36), None),
        ("", "always madvise [never]\n", (2, 36), None),
        ("", "", (2, 36), None),  # no such file
        ("", MADVISE, (2, 34), None),
        ("", MADVISE, None, None),  # musl
    ],
)
def test_when_a_command_starts_again(present, mode, glibc, wanted):
    assert _tunables(present, mode=mode, glibc=glibc) == wanted


def test_the_second_start_is_the_same_command_in_the_same_process(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(
        "import json, os, sys\n"
        "from llamajax.backends import hugepages\n"
        "print(os.getpid(), flush=True)\n"
        "hugepages._mode = lambda: '[madvise]'\n"
        "hugepages._glibc = lambda: (2, 36)\n"
        "hugepages.with_huge_pages()\n"
        "print(json.dumps([os.environ['GLIBC_TUNABLES'], sys.argv[1:], 'jax' in sys.modules]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, str(script), "a b", "--x=1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, second, last = done.stdout.splitlines()
    assert first == second
    assert json.loads(last) == ["glibc.malloc.hugetlb=1", ["a b", "--x=1"], False]
