"""Groups of devices as XLA writes them, the mesh axes they run along, and the bytes they cost."""

import pytest

from llamajax.planning.hlo import (
    Collective,
    axes_of_groups,
    device_groups,
    sent_bytes,
    slice_groups,
    slow_share,
)

SIZES = {"data": 2, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("{{0,1},{1,2},{2,3},{3,0}}", [[0, 1], [1, 2], [2, 3], [3, 0]]),
    ],
)
def test_groups_are_read_in_every_form(text, groups):
    assert device_groups(text, 4) == groups


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("[8,2]<=[16]", ("tensor",)),
        ("[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",)),
        ("[8,2]<=[2,8]T(1,0)", ("data",)),
        ("[2,8]<=[8,2]T(1,0)", ("data", "fsdp")),
        ("[16,1]<=[16]", ()),
    ],
)
def test_groups_belong_to_the_axes_along_which_they_differ(text, axes):
    assert axes_of_groups(device_groups(text, 16), SIZES) == axes


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", 3 * 100),
        ("reduce-scatter", 3 / 4 * 100),
        ("all-to-all", 3 / 4 * 100),
        ("all-reduce", 2 * 3 / 4 * 100),
    ],
)
def test_a_ring_sends_that_many_bytes(kind, sent):
    collective = Collective(kind, "", "f32", operand_bytes=100, count=1)
    assert sent_bytes(collective, [[0, 1, 2, 3], [4, 5, 6, 7]], 8) == sent


def test_a_permutation_sends_from_its_sources_alone():
    collective = Collective("collective-permute", "", "f32", operand_bytes=100, count=1)
    assert sent_bytes(collective, [[0, 1], [1, 2], [2, 3], [3, 0]], 4) == 100
    assert sent_bytes(collective, [[0, 1], [1, 2], [2, 3], [3, 3]], 4) == 75


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{1,2}x{0:1}", [[0, 2], [1, 3]]),
        ("{1,2}x{0,1}", [[0, 2], [1, 3]]),
        ("{{100000,200001},{100001,200000}}", [[0, 3], [1, 2]]),
        ("{{100000->200000},{200000->100000}}", [[0, 2], [2, 0]]),
    ],
)
def test_what_hosts_of_slices_are_told_is_read(text, groups):
    places = {100000: 0, 100001: 1, 200000: 2, 200001: 3}
    assert slice_groups(text, places) == groups


@pytest.mark.parametrize(
    ("kind", "groups", "share"),
    [
        ("all-gather", [[0, 1], [2, 3]], 0),
        ("all-gather", [[0, 2], [1, 3]], 1),
        ("all-reduce", [[0, 1, 2, 3]], 1 / 2),
        ("collective-permute", [[0, 1], [1, 2], [2, 3], [3, 0]], 1 / 2),
        ("collective-permute", [[0, 0], [1, 1]], 0),
    ],
)
def test_rings_leave_a_node_once(kind, groups, share):
    assert slow_share(kind, groups, [0, 0, 1, 1]) == share
