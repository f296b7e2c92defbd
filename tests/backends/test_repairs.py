"""Which repairs are chosen, from a verdict or by name, and what the doctor's file holds."""

import dataclasses
import json

import pytest
from jax._src.interpreters import mlir
from refusal import refused

from llamajax.backends import repairs
from llamajax.backends.repairs import (
    PlatformVerdict,
    ProbeResult,
    read_verdict,
    verdict_path,
    write_verdict,
)

FOUND = PlatformVerdict(
    platform="npu",
    platform_version="1.0",
    device_kind="Test NPU",
    jax="0.10.2",
    verdict=repairs.READY_WITH_REPAIRS,
    repairs=("compile_cache", "donation"),
    probes=(
        ProbeResult(name="donation", status="fail", message="not reused", time_s=0.5),
        ProbeResult(name="matmul", status="pass", message="fine", time_s=0.1),
    ),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache directory of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def chosen(text, *, platform="npu", verdict=None):
    return repairs.choose_repairs(text, platform, verdict)


def test_a_verdict_is_read_as_it_was_written():
    assert read_verdict(FOUND) is None
    path = write_verdict(FOUND)
    assert path == verdict_path(FOUND)
    assert read_verdict(FOUND) == FOUND
    assert [file.name for file in path.parent.iterdir()] == ["doctor.json"]
    found = json.loads(path.read_text())  # what the public surface names
    assert {"platform", "device_kind", "verdict", "repairs", "probes"} <= set(found)
    assert set(found["probes"][0]) == {"name", "status", "message", "time_s"}


def test_another_version_kind_or_release_of_jax_was_not_examined(monkeypatch):
    write_verdict(FOUND)
    for change in ({"platform_version": "1.1"}, {"device_kind": "Test NPU 2"}):
        assert read_verdict(dataclasses.replace(FOUND, **change)) is None
    monkeypatch.setattr(repairs.jax, "__version__", "0.99.0")
    assert read_verdict(FOUND) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"probes": []}', '{"probes": [{"name": "x"}]}'])
def test_a_damaged_file_is_no_verdict(text):
    write_verdict(FOUND).write_text(text)
    assert read_verdict(FOUND) is None


def test_auto_makes_the_repairs_that_the_doctor_saw_work():
    assert chosen("auto") == ()
    assert chosen("auto", verdict=FOUND) == ("donation", "compile_cache")
    assert chosen("none", verdict=FOUND) == ()
    assert chosen("plain_attention, donation") == ("donation", "plain_attention")


def test_every_name_that_is_no_repair_is_told():
    with refused("'donatoin'; did you mean donation?", "'foo'"):
        chosen("donatoin,foo,compile_cache")


def test_a_list_of_jax_that_has_changed_is_left_alone(monkeypatch):
    monkeypatch.setattr(mlir, "_platforms_with_donation", {"cpu": 1, "cuda": 2, "tpu": 3})
    assert chosen("auto", verdict=FOUND) == ("compile_cache",)
    with refused("donation: jax ", " has no list of platforms ", "; install"):
        chosen("donation")
    assert chosen("donation", platform="cpu") == ("donation",)
    repairs.apply_to_lowering("cpu", ("donation",))
    assert chosen("plain_attention") == ("plain_attention",)


def test_the_user_is_told_of_a_platform_that_nobody_examined():
    said = repairs.advice("npu", None)
    assert "run `python -m llamajax.doctor`" in said
    assert "live twice" in said
    assert repairs.advice("npu", FOUND) is None
    failed = dataclasses.replace(FOUND, verdict=repairs.NOT_READY)
    assert "not ready: donation" in repairs.advice("npu", failed)


def test_donation_is_allowed_by_name(monkeypatch):
    monkeypatch.setattr(mlir, "_platforms_with_donation", ["cpu"])
    for _ in range(2):
        repairs.apply_to_lowering("npu", ("donation",))
        assert mlir._platforms_with_donation == ["cpu", "npu"]
    assert repairs.is_donating("npu", ("donation",))
    assert not repairs.is_donating("npu", ())
    assert repairs.is_donating("cpu", ())
