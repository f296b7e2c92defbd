"""Files of compiled programs: whole or not there, however a process ends, and bounded."""

import os
import signal
import subprocess
import sys

import pytest

from llamajax.backends.compile_cache import FileCache, enable


@pytest.fixture
def cache(tmp_path):
    return FileCache(tmp_path, most_bytes=10_000)


def test_what_was_put_is_got(cache):
    assert cache.get("jit_step-1") is None
    cache.put("jit_step-1", b"program")
    cache.put("jit_step-2", b"")
    assert cache.get("jit_step-1") == b"program"
    assert cache.get("jit_step-2") == b""


def test_a_newer_value_takes_the_place_of_an_older(cache):
    cache.put("a", b"old")
    cache.put("a", b"new")
    assert cache.get("a") == b"new"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_no_program_and_makes_room_for_one(cache, tmp_path, damage):
    cache.put("a", b"x" * 100)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    changed = {"cut": whole[:-1], "flipped": whole[:-1] + b"y", "empty": b""}
    file.write_bytes(changed[damage])
    assert cache.get("a") is None
    assert list(tmp_path.iterdir()) == []
    cache.put("a", b"x" * 100)
    assert cache.get("a") == b"x" * 100


def test_a_process_killed_while_it_writes_leaves_no_program(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from llamajax.backends.compile_cache import FileCache\n"
        "write = Path.write_bytes\n"
        "def half(path, data):\n"
        "    write(path, data[: len(data) // 2])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path.write_bytes = half\n"
        "FileCache(Path(sys.argv[1]), most_bytes=10**6).put('a', b'x' * 1000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    cache = FileCache(tmp_path, most_bytes=10**6)
    assert cache.get("a") is None
    cache.put("a", b"y")
    assert cache.get("a") == b"y"


def test_the_least_recently_used_make_room(cache, tmp_path):
    for i, name in enumerate("abc"):
        cache.put(name, bytes(3000))
        (file,) = tmp_path.glob(f"{name}.program")
        os.utime(file, (1000 + i, 1000 + i))
    assert cache.get("a") is not None  # used now
    cache.put("d", bytes(3000))
    assert [name for name in "abcd" if cache.get(name) is not None] == ["a", "c", "d"]


def test_a_user_who_forbids_it_is_obeyed(tmp_path):
    """The tests themselves run without: see conftest.py."""
    assert enable(str(tmp_path / "programs"), force=True) is None
    assert not (tmp_path / "programs").exists()
