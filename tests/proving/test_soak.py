"""The soak of `benchmarks/`, a short one."""

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_a_run_that_is_hurt_twice_logs_what_an_undisturbed_one_does(tmp_path):
    command = [sys.executable, str(SOAK), "--faults=2", f"--workdir={tmp_path / 'soak'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 faults, exit code 0" in done.stdout
