"""Which options a step is compiled with: the config's, before XLA_FLAGS, before the table."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from llamajax.backends import choose_compiler_options, compiler_flags, compiler_options, devices
from llamajax.backends.platforms import LAYER_BYTES, platform_facts
from llamajax.errors import UserError

# options that XLA has for every platform, and that change nothing of a sum
LEVEL = "xla_backend_optimization_level"
FLAG = "xla_gpu_all_gather_combine_threshold_bytes"
PASSES = "xla_disable_hlo_passes"
TABLE = (
    {LEVEL: 2, FLAG: LAYER_BYTES},
    {PASSES: "rematerialization"},
    {"xla_cpu_enable_fast_math": True, "xla_gone": 1},
)


@pytest.fixture
def chosen(monkeypatch):
    """Returns the options chosen on the CPU with TABLE in place of its own."""
    facts = dataclasses.replace(platform_facts("cpu"), compiler_options=TABLE)
    monkeypatch.setattr(compiler_options, "platform_facts", lambda _: facts)
    monkeypatch.delenv("XLA_FLAGS", raising=False)

    def choose(asked=None, layer_bytes=3.0):
        return choose_compiler_options(
            asked, platform="cpu", device=jax.devices()[0], layer_bytes=layer_bytes
        )

    return choose


def test_a_group_with_an_option_that_the_compiler_does_not_know_is_left_out_and_named(chosen):
    found = chosen()
    assert found.values == {LEVEL: 2, FLAG: 2**30, PASSES: "rematerialization"}
    assert found.refused == {"xla_gone": found.refused["xla_gone"]}
    assert "No such compile option" in found.refused["xla_gone"]
    (line,) = found.warnings()
    assert "xla_gone: left out, with" in line
    assert chosen(layer_bytes=2.0**31).values[FLAG] == 2**31
    lowered = jax.jit(jnp.sin).lower(1.0)
    assert found.compile(lowered)(1.0) == jnp.sin(1.0)


@pytest.mark.parametrize(
    ("kind", "values"), [("TPU v5p", {LEVEL: 1}), ("TPU v5 lite", {}), ("unknown", {})]
)
def test_a_kind_of_device_has_options_of_its_own(monkeypatch, kind, values):
    facts = dataclasses.replace(platform_facts("cpu"), kind_options={"v5p": ({LEVEL: 1},)})
    entry = devices.find(kind)
    monkeypatch.setattr(compiler_options, "platform_facts", lambda _: facts)
    monkeypatch.setattr(devices, "find", lambda _: entry)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    found = choose_compiler_options(None, platform="cpu", device=jax.devices()[0], layer_bytes=1.0)
    assert found.values == values


def test_the_config_goes_before_flags_and_flags_before_the_table(chosen, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{PASSES}=dce --{FLAG}=7")
    assert chosen().values == {LEVEL: 2, PASSES: "dce,rematerialization"}
    assert chosen(f"{LEVEL}=1,{FLAG}=8").values == {
        LEVEL: 1, FLAG: 8, PASSES: "dce,rematerialization"
    }  # fmt: skip
    asked = f"{PASSES}=algsimp+cse"
    assert chosen(asked).values[PASSES] == "algsimp,cse,rematerialization"
    assert chosen(f"{PASSES}=''").values[PASSES] == ""  # the table's list is not wanted


def test_what_was_asked_for_and_is_unknown_is_refused(chosen):
    with pytest.raises(UserError, match=r"backend\.compiler_options.*xla_mistyped"):
        chosen("xla_mistyped=1")
    with pytest.raises(UserError, match=f"backend.compiler_options.*{LEVEL}"):
        chosen(f"{LEVEL}=high")


def test_the_cpu_has_no_options_of_ours():
    device = jax.devices()[0]
    found = choose_compiler_options(None, platform="cpu", device=device, layer_bytes=1.0)
    assert (found.values, found.refused) == ({}, {})


def test_what_makes_a_platform_repeat_its_bits_is_added_where_it_is_asked_for(monkeypatch):
    facts = dataclasses.replace(platform_facts("cpu"), deterministic_options=({LEVEL: 1},))
    monkeypatch.setattr(compiler_options, "platform_facts", lambda _: facts)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    to = {"platform": "cpu", "device": jax.devices()[0], "layer_bytes": 1.0}
    assert choose_compiler_options(None, **to).values == {}
    assert choose_compiler_options(None, **to, deterministic=True).values == {LEVEL: 1}
    asked = choose_compiler_options(f"{LEVEL}=0", **to, deterministic=True)
    assert asked.values == {LEVEL: 0}  # the user's word comes first


def test_flags_that_only_dump_do_not_change_programs():
    found = {"XLA_FLAGS": "--xla_b=1 --xla_dump_to=/tmp/rank1 --xla_a=2", "OTHER": "--xla_c=3"}
    assert compiler_flags(found) == "--xla_a=2 --xla_b=1"
