"""What hurts one of two processes is agreed upon: no save strands the other or counts by half."""

import pytest
from two_savers import run_both


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    """What both processes saw."""
    return run_both(tmp_path_factory.mktemp("two") / "checkpoints")


def test_a_disk_that_refuses_one_process_costs_both_that_checkpoint_only(seen):
    refused = "checkpoint of step {} was not saved: process {}: File too large"
    assert seen["well"] == ["saved", [1]]
    assert seen["process 1 cannot write"] == [refused.format(2, 1), [1]]
    assert seen["again"] == ["saved", [1, 2]]
    assert seen["process 0 cannot write"] == [refused.format(3, 0), [1, 2]]
    assert seen["after that"] == ["saved", [1, 2, 3]]


def test_a_process_whose_mount_is_gone_makes_no_half_checkpoint(seen):
    assert "step 4 was not saved: process 1: there is no" in seen["process 1 elsewhere"]
    assert seen["parts"].startswith("what process 7 wrote is not in")
    assert seen["back"] == ["saved", [2, 3, 4]]


def test_damage_that_one_process_sees_leads_both_to_the_same_step(seen):
    assert seen["damage for one"] == [3, 2, True]
    assert seen["flipped"] == [2, 2, 2.0]
    assert seen["names"] == ["2", "3.damaged", "4.damaged"]
