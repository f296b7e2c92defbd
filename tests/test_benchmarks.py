"""The benchmarks run as a user runs them, small; how fast they are is not looked at."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import warm

REPOSITORY = Path(__file__).resolve().parents[1]


def run(script: str, *flags: str) -> subprocess.CompletedProcess:
    """Return the finished script, run on one CPU device."""
    return warm.run(
        [sys.executable, f"benchmarks/{script}", *flags],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def rows_of(done: subprocess.CompletedProcess) -> dict[str, str]:
    """Return the rows of the one table that a script prints."""
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", done.stdout, re.MULTILINE))


def number(text: str) -> float:
    """Return the number that a cell begins with."""
    return float(text.split()[0].replace(",", ""))


def test_train_step_prints_one_table():
    rows = rows_of(
        run("train_step.py", "--preset=tiny", "--batch=2", "--seq_len=16", "--steps=3",
            "--num_cpu_devices=2", "--mesh=data=2", "--accumulation=1")
    )  # fmt: skip
    assert rows["machine"] == "cpu, cpu, data 2 (2 devices)"
    assert "of 3 steps" in rows["step time"]
    assert rows["MFU, causal half of it"].startswith("null, peak unknown")
    assert rows["peak memory"].endswith("(process peak RSS)")
    assert number(rows["tokens/s"]) > 0


def test_decode_prints_one_table():
    rows = rows_of(
        run("decode.py", "--preset=tiny", "--batch=2", "--prompt_len=4", "--new_tokens=4",
            "--rounds=1", "--dtype=float32")
    )  # fmt: skip
    assert rows["machine"] == "cpu, cpu, one device (1 device)"
    assert rows["work"] == "2 prompts of 4 tokens, 4 new ones each, float32, median of 1 rounds"
    assert rows["compiling"].endswith("for 2 programs")
    assert number(rows["decoding, tokens/s"]) > 0
    assert number(rows["time to first token"]) > 0
    assert "transformers, tokens/s" not in rows


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("train_step.py", "--preset=bench-23m", "did you mean bench-32m"),
        ("train_step.py", "--mesh=fdsp=2", "'fdsp=2' is not AXIS=SIZE"),
        ("train_step.py", "--batch=3 --accumulation=2", "data.global_batch_size = 3"),
        ("train_step.py", "--seq_len=4096", "longer than model.max_seq_len = 2048"),
        ("train_step.py", "--steps=0", "--steps=0"),
        ("decode.py", "--new_tokens=1", "--new_tokens=1: two at least"),
        ("decode.py", "--rounds=0", "--rounds=0: must be at least 1"),
        ("decode.py", "--preset=tiny --prompt_len=4096", "are more than the"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(script, flags, words):
    done = run(script, *flags.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.live
def test_torch_does_the_same_work():
    done = run("against_torch.py", "--preset=tiny", "--batch=2", "--seq_len=16", "--rounds=2",
               "--steps=2", "--no_compile")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| median \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", done.stdout, re.MULTILINE)
    losses = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", done.stdout, re.MULTILINE)
    assert [int(step) for step, _, _ in losses] == [1, 2, 3, 6]
    for _, ours, theirs in losses:
        assert float(ours) == pytest.approx(float(theirs), abs=1e-4)
    assert float(losses[-1][1]) < float(losses[0][1])
