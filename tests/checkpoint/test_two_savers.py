"""What hurts one of two processes is agreed upon: no save strands the other or counts by half."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import warm

SCRIPT = Path(__file__).with_name("two_savers.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What each process saw, by process."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment.pop("XLA_FLAGS", None)
    both = [
        warm.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(port), str(directory)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        texts = [process.communicate(timeout=60) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], texts[0][1] + texts[1][1]
    return [json.loads(out.splitlines()[-1]) for out, _ in texts]


def test_both_saw_the_same(seen):
    assert seen[0] == seen[1]


def test_a_disk_that_refuses_one_process_costs_both_that_checkpoint_only(seen):
    refused = "checkpoint of step {} was not saved: process {}: File too large"
    assert seen[0]["well"] == ["saved", [1]]
    assert seen[0]["process 1 cannot write"] == [refused.format(2, 1), [1]]
    assert seen[0]["again"] == ["saved", [1, 2]]
    assert seen[0]["process 0 cannot write"] == [refused.format(3, 0), [1, 2]]
    assert seen[0]["after that"] == ["saved", [1, 2, 3]]


def test_a_process_whose_mount_is_gone_makes_no_half_checkpoint(seen):
    assert "step 4 was not saved: process 1: there is no" in seen[0]["process 1 elsewhere"]
    assert seen[0]["parts"].startswith("what process 7 wrote is not in")
    assert seen[0]["back"] == ["saved", [2, 3, 4]]


def test_damage_that_one_process_sees_leads_both_to_the_same_step(seen):
    assert seen[0]["damage for one"] == [3, 2, True]
    assert seen[0]["flipped"] == [2, 2.0]
    assert seen[0]["names"] == ["2", "3.damaged", "4.damaged"]
