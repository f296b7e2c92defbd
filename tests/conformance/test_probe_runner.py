"""The parent of the probes: whatever one of them does, the others are tried and none is blamed."""

from pathlib import Path

import pytest

from llamajax.config.schema import BackendConfig
from llamajax.conformance.probe_runner import ProbeRunner
from llamajax.conformance.probe_table import NOT_TRIED, Probe
from llamajax.errors import UserError

CPU = BackendConfig(name="cpu", num_cpu_devices=2)


def fake(name: str, function: str = "passes", **fields) -> Probe:
    return Probe(
        name=name,
        group="fake",
        function=f"fake_probes:{function}",
        needed="always",
        why="for a test",
        otherwise="nothing",
        **fields,
    )


@pytest.fixture
def examined(monkeypatch):
    """Runs probes of `fake_probes.py` in child processes; outcomes by name."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def run(*probes: Probe, backend: BackendConfig = CPU, limit_s: float = 60.0) -> dict:
        runner = ProbeRunner(
            backend=backend, limit_s=limit_s, show=lambda _: None, begin=lambda _: None
        )
        runner.run(probes)
        return {o.name: (o.status, o.message) for o in runner.results}

    return run


def test_every_end_of_a_probe_is_its_own(examined):
    ends = ("is_wrong", "is_unsupported", "raises", "aborts", "leaves")
    probes = [probe for name in ends for probe in (fake(name, name), fake(f"after_{name}"))]
    found = examined(fake("first"), *probes)
    assert found.pop("start") == ("pass", "2 devices of kind cpu")
    for name in ("first", *(f"after_{name}" for name in ends)):
        assert found[name] == ("pass", "on 2"), name
    assert found["is_wrong"] == ("fail", "3 instead of 2")
    assert found["is_unsupported"] == ("unsupported", "there is no such unit")
    assert found["raises"] == ("fail", "KeyError: 'what nobody thought of'")
    assert found["aborts"][0] == found["leaves"][0] == "fail"
    assert "SIGABRT, at fake_probes.py" in found["aborts"][1]


def test_a_hang_ends_with_its_time_and_says_where(examined):
    found = examined(fake("hanging", "hangs"), fake("after"), limit_s=1.0)
    assert found["hanging"][0] == "fail"
    assert "did not come back within 1 s, at fake_probes.py" in found["hanging"][1]
    assert "in hangs" in found["hanging"][1]
    assert found["after"][0] == "pass"


def test_without_the_smallest_program_nothing_is_tried(examined):
    found = examined(fake("program", "is_wrong"), fake("after"))
    assert found["after"][0] == "unsupported"
    assert found["after"][1].startswith(NOT_TRIED)


def test_a_repair_is_tried_only_in_place_of_what_did_not_pass(examined):
    forced = {"function": "fake_probes:tells_repairs", "repair": "compile_cache"}
    asked = [
        Probe(name=name, group="fake", needed="never", why="", otherwise="", **forced | more)
        for name, more in {
            "instead_of_good": {"instead_of": "good"},
            "instead_of_bad": {"instead_of": "bad"},
        }.items()
    ]
    found = examined(fake("good"), fake("bad", "is_unsupported"), *asked)
    assert "instead_of_good" not in found
    assert found["instead_of_bad"] == ("pass", "compile_cache")


def test_a_backend_that_is_not_there_is_the_users_mistake(examined):
    with pytest.raises(UserError, match="'npuu' did not come up"):
        examined(fake("any"), backend=BackendConfig(name="npuu"))
