"""Whatever one probe does, the others are run and none of them is blamed."""

import os
from pathlib import Path
from unittest import mock

import pytest

from llamajax.config.schema import BackendConfig
from llamajax.conformance import probe_runner
from llamajax.conformance.probe_runner import ProbeRunner
from llamajax.conformance.probe_table import NOT_TRIED, Probe
from llamajax.errors import UserError

CPU = BackendConfig(name="cpu", num_cpu_devices=2)


def fake(name, function="passes", needed="always", **fields):
    function = f"fake_probes:{function}"
    words = {"group": "fake", "why": "for a test", "otherwise": "nothing"}
    return Probe(name=name, function=function, needed=needed, **words, **fields)


@pytest.fixture
def results(monkeypatch):
    """Runs probes of `fake_probes.py` in child processes; status and message by name."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def run(*probes, backend=CPU, limit_s=60.0):
        runner = ProbeRunner(backend=backend, limit_s=limit_s, live=mock.Mock())
        runner.run(probes)
        return {r.name: (r.status, r.message) for r in runner.results}

    return run


def test_every_probe_gets_its_own_result(results):
    ends = ("is_wrong", "is_unsupported", "raises", "aborts", "leaves")
    probes = [probe for name in ends for probe in (fake(name, name), fake(f"after_{name}"))]
    found = results(fake("first"), *probes)
    assert found.pop("start") == ("pass", "2 devices of kind cpu")
    for name in ("first", *(f"after_{name}" for name in ends)):
        assert found[name] == ("pass", "on 2"), name
    assert found["is_wrong"] == ("fail", "3 instead of 2")
    assert found["is_unsupported"] == ("unsupported", "there is no such unit")
    assert found["raises"] == ("fail", "KeyError: 'what nobody thought of'")
    assert found["aborts"][0] == found["leaves"][0] == "fail"
    assert "SIGABRT, at fake_probes.py" in found["aborts"][1]


@pytest.fixture
def time_is_over_once_it_hangs(tmp_path, monkeypatch):
    """However long the machine takes to get there, or for anything else."""
    hangs, read = tmp_path / "hangs", probe_runner._ProbeProcess.read

    def read_or_hang(process, _):
        while (message := read(process, 0.05)) is None and not hangs.exists():
            pass
        if message is None:
            hangs.unlink()
        return message

    monkeypatch.setenv("HANGS", str(hangs))
    monkeypatch.setattr(probe_runner._ProbeProcess, "read", read_or_hang)


@pytest.mark.usefixtures("time_is_over_once_it_hangs")
def test_a_hang_in_the_import_of_jax_says_where(results, tmp_path, monkeypatch):
    lines = "import os, signal\nopen(os.environ['HANGS'], 'w').close()\nwhile True: signal.pause()"
    (tmp_path / "jax.py").write_text(lines)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    status, message = results(fake("never", "after"))["start"]
    assert status == "fail"
    assert "did not come back within 120 s, at probe_loop.py:" in message
    assert message.endswith("in <module>")  # at `import jax`


@pytest.mark.usefixtures("time_is_over_once_it_hangs")
def test_a_hang_ends_with_its_time_and_says_where(results):
    found = results(fake("hanging", "hangs"), fake("after"))
    assert found["hanging"][0] == "fail"
    assert "did not come back within 60 s, at fake_probes.py" in found["hanging"][1]
    assert "in hangs" in found["hanging"][1]
    assert found["after"][0] == "pass"


def test_without_the_smallest_program_nothing_is_tried(results):
    found = results(fake("program", "is_wrong"), fake("after"))
    assert found["after"][0] == "unsupported"
    assert found["after"][1].startswith(NOT_TRIED)


def test_a_repair_is_tried_only_in_place_of_what_did_not_pass(results):
    forced = {"function": "shows_repairs", "needed": "never", "repair": "compile_cache"}
    found = results(
        fake("good"),
        fake("bad", "is_unsupported"),
        fake("instead_of_good", instead_of="good", **forced),
        fake("instead_of_bad", instead_of="bad", **forced),
    )
    assert "instead_of_good" not in found
    assert found["instead_of_bad"] == ("pass", "compile_cache")


def test_a_backend_that_is_not_there_is_the_users_mistake(results):
    with pytest.raises(UserError, match="'npuu' did not come up"):
        results(fake("any"), backend=BackendConfig(name="npuu"))
