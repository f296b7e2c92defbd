"""A wall clock that is set back between or in saves keeps none of them waiting."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# TensorStore ends its idle threads after 20 s; the first save after that starts new ones.
_SAVES = """
import struct, sys, threading, time
import numpy as np
from llamajax.checkpoint import Checkpointer

clock = open(sys.argv[2], "r+b", buffering=0)
with Checkpointer(sys.argv[1], keep=9, keep_every=None, asynchronous=True) as saver:
    for step in range(1, 6):
        if step == 2:
            threading.Event().wait(22)
        before = time.time()
        saver.save(step, {"x": np.ones((64, 64), np.float32)}, meta={})
        clock.seek(0)
        clock.write(struct.pack("<q", -3600 * step))
        assert time.time() < before
    saver.wait()
    print(saver.steps())
"""


@pytest.mark.slow
def test_a_clock_set_back_an_hour_delays_no_save(tmp_path: Path):
    library, clock = tmp_path / "wall_clock.so", tmp_path / "clock"
    source = Path(__file__).with_name("wall_clock.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    clock.write_bytes(bytes(8))
    done = subprocess.run(
        [sys.executable, "-c", _SAVES, str(tmp_path / "checkpoints"), str(clock)],
        env=os.environ | {"LD_PRELOAD": str(library), "CLOCK_FILE": str(clock)},
        capture_output=True,
        text=True,
        timeout=300,  # where it waits, it waits for an hour
    )
    assert done.stdout == "[1, 2, 3, 4, 5]\n", done.stderr
