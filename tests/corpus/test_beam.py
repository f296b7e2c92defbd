"""Preparing on Apache Beam's own local runner gives what one process gives, byte for byte."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

HAS_BEAM = importlib.util.find_spec("apache_beam") is not None
needs_beam = pytest.mark.skipif(not HAS_BEAM, reason="pip install 'llamajax[beam]' to test it")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four files of 400 documents each."""
    folder = tmp_path / "input"
    folder.mkdir()
    for name in "abcd":
        lines = [json.dumps({"text": f"{name * (i % 9)} line {i} said so"}) for i in range(400)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def run(folder: Path, output: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llamajax.prepare", f"--input={folder}", f"--output={output}"]
    command += ["--workers=1", *flags]
    return subprocess.run(command, capture_output=True, text=True)


@needs_beam
@pytest.mark.parametrize("flags", [("--tokenizer=train:280",), ("--tokenizer=byte",)])
def test_beam_gives_what_one_process_gives(folder, tmp_path, flags):
    assert run(folder, tmp_path / "one", *flags).returncode == 0
    done = run(folder, tmp_path / "beam", *flags, "--runner=beam", "--num_tasks=3")
    assert done.returncode == 0, done.stderr
    one, beam = tmp_path / "one", tmp_path / "beam"
    assert {f.name: f.read_bytes() for f in one.iterdir()} == {
        f.name: f.read_bytes() for f in beam.iterdir()
    }
    assert not (tmp_path / "beam.parts").exists()


@needs_beam
def test_what_a_task_refuses_is_the_users_to_fix(folder, tmp_path):
    (folder / "c.jsonl").write_text('{"text": 3}\n')
    done = run(folder, tmp_path / "out", "--tokenizer=byte", "--runner=beam")
    assert done.returncode == 2, done.stderr
    assert "c.jsonl:1: 'text' is of type int, not a string" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(HAS_BEAM, reason="Apache Beam is here")
def test_beam_that_is_missing_is_named(folder, tmp_path):
    done = run(folder, tmp_path / "out", "--tokenizer=byte", "--runner=beam")
    assert done.returncode == 2
    assert "pip install 'llamajax[beam]'" in done.stderr
