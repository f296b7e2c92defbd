"""The roofline's parts that need no program."""

import dataclasses

from llamajax.backends import devices
from llamajax.planning.roofline import link_seconds


def test_links_work_at_the_same_time_and_the_slower_decides():
    v5p = next(d for d in devices.DEVICES if d.name == "v5p")
    fast, slow = v5p.fast_bytes_per_s, v5p.slow_bytes_per_s
    assert (fast, slow) == (180e9, 6.25e9)
    assert link_seconds(fast, 0, v5p) == 1
    assert link_seconds(4 * slow, 2 * slow, v5p) == 2
    assert link_seconds(3 * fast, slow / 2, v5p) == 3


def test_an_unknown_network_has_no_time():
    v4 = next(d for d in devices.DEVICES if d.name == "v4")
    assert link_seconds(1e9, 0, v4) > 0
    assert link_seconds(1e9, 1, v4) is None
    known = dataclasses.replace(v4, slow_bytes_per_s=1e9)
    assert link_seconds(1e9, 1e9, known) == 1
