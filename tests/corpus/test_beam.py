"""Preparing on Apache Beam's own local runner gives what one process gives, byte for byte."""

import importlib.util
import subprocess
from pathlib import Path

import pytest
from shell import verb
from workdirs import contents, write_rows

HAS_BEAM = importlib.util.find_spec("apache_beam") is not None
needs_beam = pytest.mark.skipif(not HAS_BEAM, reason="pip install 'llamajax[beam]' to test it")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four files of 400 documents each."""
    folder = tmp_path / "input"
    for name in "abcd":
        texts = (f"{name * (i % 9)} line {i} said so" for i in range(400))
        write_rows(folder / f"{name}.jsonl", *({"text": text} for text in texts))
    return folder


def run(folder: Path, output: Path, *flags: str) -> subprocess.CompletedProcess:
    where = (f"--input={folder}", f"--output={output}", "--workers=1")
    return subprocess.run(verb("prepare", *where, *flags), capture_output=True, text=True)


@needs_beam
@pytest.mark.parametrize("flags", [("--tokenizer=train:280",), ("--tokenizer=byte",)])
def test_beam_gives_what_one_process_gives(folder, tmp_path, flags):
    assert run(folder, tmp_path / "one", *flags).returncode == 0
    done = run(folder, tmp_path / "beam", *flags, "--runner=beam", "--num_tasks=3")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "beam")
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
