"""What tests/conftest.py leaves out or fails: tests that need torch, and skips in CI."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
CASES = """
import pytest

@pytest.mark.live
def test_live(): pass

def test_lacks(): pytest.importorskip("no_such_package")

@pytest.mark.skipif(True, reason="an optional extra")
def test_optional(): pass

@pytest.mark.xfail
def test_expected(): assert False
"""


def outcome(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str, ci: str) -> str:
    """The last line of a session with our conftest."""
    (folder / "test_cases.py").write_text(CASES)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = live\n")
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{TESTS / 'support'}")
    monkeypatch.setenv("LLAMAJAX_CI", ci)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.stdout.splitlines()[-1].strip("= ").partition(" in ")[0]


def test_a_skip_is_a_failure_in_ci_but_for_optional_extras(tmp_path, monkeypatch):
    found = outcome(tmp_path, monkeypatch, ci="1")
    assert found == "1 failed, 1 skipped, 1 deselected, 1 xfailed"
    found = outcome(tmp_path, monkeypatch, ci="0")
    assert found == "2 skipped, 1 deselected, 1 xfailed"
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such')\n")
    assert "1 error" in outcome(tmp_path, monkeypatch, ci="1")


def test_live_tests_run_when_asked_for(tmp_path, monkeypatch):
    assert outcome(tmp_path, monkeypatch, "-m", "live", ci="1") == "1 passed, 3 deselected"
