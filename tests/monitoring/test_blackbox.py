"""The last steps are on disk when something happens, also when nobody is left to write them."""

import math
import os
import subprocess
import sys

import pytest

from llamajax.monitoring.blackbox import BlackBox, boxes, read_box

KILLED = """
import os, signal, sys
from llamajax.monitoring.blackbox import BlackBox
box = BlackBox(sys.argv[1], steps=4, primary=True)
box.begin()
for step in range(1, 11):
    box.add({"step": step, "loss": float(step)})
os.kill(os.getpid(), signal.SIGKILL)
"""


def filled(workdir, last, *, primary=True):
    workdir.mkdir(exist_ok=True)
    box = BlackBox(workdir, steps=4, primary=primary)
    box.begin()
    for step in range(1, last + 1):
        box.add({"step": step, "loss": math.nan if step == last else 1 / step})
    return box


def test_a_box_has_what_happened_and_the_last_steps(tmp_path):
    with filled(tmp_path, 7) as box:
        file = box.write("skip", step=7, sample_ids=[3, 1])
    assert list((tmp_path / "blackbox").iterdir()) == [file]  # a good end leaves nothing else
    assert file.name == "7_skip.jsonl"
    head, rows = read_box(file)
    assert (head["step"], head["reason"], head["sample_ids"]) == (7, "skip", [3, 1])
    assert [row["step"] for row in rows] == [4, 5, 6, 7]
    assert rows[0]["loss"] == 1 / 4
    assert math.isnan(rows[-1]["loss"])


def test_an_error_leaves_a_box(tmp_path):
    with pytest.raises(KeyError), filled(tmp_path, 3):
        raise KeyError("what was wrong")
    (file,) = (tmp_path / "blackbox").iterdir()
    head, rows = read_box(file)
    assert (file.name, len(rows)) == ("3_crash.jsonl", 3)
    assert "what was wrong" in head["error"]


def test_the_next_start_finds_the_steps_of_a_killed_process(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert boxes(tmp_path) == []
    with BlackBox(tmp_path, steps=4, primary=True):
        pass  # refused before it began: nothing changes
    assert boxes(tmp_path) == []
    filled(tmp_path, 0)
    (file,) = (tmp_path / "blackbox").iterdir()
    head, rows = read_box(file)
    assert (file.name, head["reason"]) == ("10_killed.jsonl", "killed")
    assert [row["step"] for row in rows] == [7, 8, 9, 10]


def test_a_disk_that_refuses_costs_the_box_and_one_warning(tmp_path, capsys):
    (tmp_path / "blackbox").write_text("in the way")
    assert filled(tmp_path, 3).write("skip", step=3) is None
    assert capsys.readouterr().err.count("warning") == 1


def test_other_processes_write_nothing_and_old_boxes_go(tmp_path):
    assert filled(tmp_path, 3, primary=False).write("skip", step=3) is None
    assert list(tmp_path.iterdir()) == []
    with filled(tmp_path, 3) as box:
        for step in range(40):
            os.utime(box.write("skip", step=step), (step, step))
        box.write("spike", step=99)
    names = [file.name for file in boxes(tmp_path)]
    assert (len(names), names[0]) == (32, "99_spike.jsonl")
    assert "0_skip.jsonl" not in names


def test_a_file_that_is_no_box_is_refused(tmp_path):
    (tmp_path / "x").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="not a black box"):
        read_box(tmp_path / "x")
