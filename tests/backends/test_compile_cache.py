"""Files of compiled programs: whole or not there, however a process ends, and bounded."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import warm

from llamajax.backends.compile_cache import FileCache, cache_directory, enable
from llamajax.files import write_problem


@pytest.fixture
def cache(tmp_path):
    return FileCache(tmp_path)


def test_what_was_put_is_got(cache):
    assert cache.get("jit_step-1") is None
    for value in (b"old", b"new", b""):
        cache.put("jit_step-1", value)
        assert cache.get("jit_step-1") == value


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


def test_a_process_killed_while_it_writes_leaves_no_program(cache, tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from llamajax.backends.compile_cache import FileCache\n"
        "write = Path.write_bytes\n"
        "def half(path, data):\n"
        "    write(path, data[: len(data) // 2])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path.write_bytes = half\n"
        "FileCache(Path(sys.argv[1])).put('a', b'x' * 1000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert cache.get("a") is None
    cache.put("a", b"y")
    assert cache.get("a") == b"y"


def test_the_least_recently_used_make_room_when_the_cache_is_opened(cache, tmp_path):
    for i, name in enumerate("abcd"):
        cache.put(name, bytes(3000))
        os.utime(tmp_path / f"{name}.program", (1000 + i, 1000 + i))
    assert cache.get("a") is not None  # used now
    left = tmp_path / ".e.program.0.partial"  # by a process that was killed
    left.write_bytes(b"half")
    os.utime(left, (1000, 1000))
    opened = FileCache(tmp_path, most_bytes=10_000)
    assert [name for name in "abcd" if opened.get(name) is not None] == ["a", "c", "d"]
    assert not left.exists()


def test_a_user_who_forbids_it_is_obeyed(tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert enable(str(tmp_path / "programs"), force=True) is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not (tmp_path / "programs").exists()


def test_without_a_folder_to_write_nothing_is_kept_and_the_user_is_told(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    try:
        assert enable(str(tmp_path / "file" / "x"), force=True) is None
        assert not jax.config.jax_enable_compilation_cache
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert "programs are not kept: " in (said := capsys.readouterr().err)
    assert "file/x: Not a directory; set XDG_CACHE_HOME" in said
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # of nobody that the system knows
    assert write_problem(cache_directory("programs")) == "Not a directory"


_ONE_OF_TWO = """
import json, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from llamajax import backends
from llamajax.config.schema import BackendConfig
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
backends.start(
    BackendConfig(name="cpu", num_cpu_devices=1, compile_cache=folder, process_id=rank,
                  num_processes=2, coordinator_address=f"localhost:{port}"),
    keep_programs=True,
)
placed = NamedSharding(jax.make_mesh((2,), ("x",)), PartitionSpec("x"))
x = jax.make_array_from_process_local_data(placed, np.float32([rank + 1]))
value = float(jax.jit(lambda x: (3 * x).sum())(x))
print(json.dumps([value, sum(name.endswith("/cache_hits") for name in hits)]))
"""


def _two_processes(folder: Path) -> list[list[float]]:
    """Of each: a sum over both, and how many programs it found."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true"}
    started = [
        warm.Popen(
            [sys.executable, "-c", _ONE_OF_TWO, rank, port, str(folder)],
            stdout=subprocess.PIPE, text=True, env=env,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [json.loads(text.splitlines()[-1]) for text in printed]


def test_of_two_cpu_processes_the_first_finds_its_programs_and_the_other_is_not_misled(tmp_path):
    """JAX keeps the programs of process 0 alone; on a CPU the other's have keys of their own."""
    first = _two_processes(tmp_path)
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert first == [[9.0, 0], [9.0, 0]]
    (value, hits), other = _two_processes(tmp_path)
    assert value == 9.0
    assert hits == len(kept) > 0
    assert other == [9.0, 0]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept
