"""Probes can fail: what they allow is little more than what is right."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusal import refused

from llamajax.backends import ProbeResult, compiler_options
from llamajax.backends.platforms import platform_facts
from llamajax.conformance import (
    arithmetic_probes,
    collective_probes,
    machine_probes,
    operation_probes,
)
from llamajax.conformance.bench import Bench, WrongError, compare
from llamajax.conformance.probe_table import PROBES, START, chosen, verdict_on
from llamajax.ops import references
from llamajax.ops.norm import rms_norm
from llamajax.sharding import AXES


@pytest.fixture
def bench(tmp_path):
    preferences = platform_facts("cpu").attention_preferences
    machine = SimpleNamespace(
        platform="cpu", compute_capability=None, attention_preferences=preferences
    )
    return Bench(devices=jax.devices(), machine=machine, folder=tmp_path)


@pytest.mark.parametrize(
    "name",  # test_attention.py has the others
    [p.name for p in PROBES if p.group == "operations" and "attention" not in p.name],
)
def test_our_operations_are_those_of_float64_numpy(bench, name):
    getattr(operation_probes, name)(bench)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, s: rms_norm(x, s, eps=1e-5), None),
        (lambda x, s: rms_norm(x, s, eps=2e-4), "float32 error .* is allowed"),
        (lambda x, s: rms_norm(jax.lax.stop_gradient(x), s, eps=1e-5), "backward"),
        (lambda x, s: rms_norm(x, s, eps=1e-5) * jnp.asarray(jnp.nan, x.dtype), "nan"),
    ],
    ids=["right", "value", "gradient", "nan"],
)
def test_a_wrong_operation_is_found(bench, function, message):
    reference = functools.partial(references.rms_norm, eps=1e-5)
    arrays = [np.random.RandomState(0).standard_normal((5, 27)), np.ones(27)]
    if message is None:
        compare(bench, function, reference, arrays)
        return
    with pytest.raises(WrongError, match=message):
        compare(bench, function, reference, arrays)


def test_products_that_sum_in_bfloat16_break_the_bound():
    left, right, exact = arithmetic_probes.operands("bfloat16")
    allowed = arithmetic_probes.bound(left, right, exact, dtype="bfloat16")
    total = np.zeros(exact.shape, jnp.bfloat16)
    for k in range(left.shape[1]):
        total = total + left[:, k : k + 1] * right[k : k + 1]
    assert np.max(np.abs(total.astype(np.float64) - exact) / allowed) > 2
    rounded = exact.astype(np.float32).astype(jnp.bfloat16).astype(np.float64)
    assert np.max(np.abs(rounded - exact) / allowed) <= 1


def test_a_collective_that_swaps_two_members_is_found(bench):
    def swapped(x, axis):
        y = jax.lax.all_gather(x, axis, axis=0, tiled=True)
        return jnp.concatenate([y[x.shape[0] :], y[: x.shape[0]]])

    def joined(blocks):
        return np.stack([np.concatenate(blocks, axis=1)] * len(blocks))

    with pytest.raises(WrongError, match=r"wrong over fsdp on fsdp 8 .* in bfloat16"):
        collective_probes.on_every_axis(bench, swapped, joined)


@pytest.mark.parametrize("count", [4, 8, 12, 64])
def test_every_axis_has_devices_on_some_layout(count):
    layouts = collective_probes.layouts(count)
    assert {axis for sizes in layouts for axis in sizes} == set(AXES)
    assert {int(np.prod(list(sizes.values()))) for sizes in layouts} == {count}
    assert all(size > 1 for sizes in layouts for size in sizes.values())


def test_the_reference_bits_are_those_of_this_release():
    assert arithmetic_probes.checksums(jax.devices()[0]) == arithmetic_probes.REFERENCE_CRC


@pytest.mark.parametrize(
    ("statuses", "word", "repairs"),
    [
        ({"donation_by_name": "unsupported", "compile_cache_by_name": "fail"}, "ready", ()),
        ({"donation": "unsupported", "compile_cache_by_name": "fail"},
         "ready with repairs", ("donation",)),
        ({"matmul_bfloat16": "fail"}, "not ready", ("donation", "compile_cache")),
        ({"matmul_bfloat16": "unsupported", "donation_by_name": "fail",
          "compile_cache_by_name": "fail"}, "ready", ()),
        ({"scan": "unsupported"}, "not ready", ("donation", "compile_cache")),
        ({"attention_kernel": "fail", "checkpoint_asynchronous": "fail",
          "donation_by_name": "fail", "compile_cache_by_name": "fail"},
         "ready with repairs", ("plain_attention", "synchronous_checkpoints")),
        ({"attention_kernel": "fail", "attention": "fail", "donation_by_name": "fail",
          "compile_cache_by_name": "fail"}, "not ready", ()),
    ],
)  # fmt: skip
def test_verdict_and_repairs_follow_from_the_results(statuses, word, repairs):
    """All probes pass but these."""
    results = [
        ProbeResult(name=p.name, status=statuses.get(p.name, "pass"), message="", time_s=0.0)
        for p in (START, *PROBES)
    ]
    found = verdict_on(None, results, asked_for="cpu")
    assert (found.platform, found.verdict, found.repairs) == ("cpu", word, repairs)


def test_unknown_names_of_probes_are_all_named():
    with refused("'scna'; did you mean scan", "'nothing'"):
        chosen("scna,rope,nothing")
    assert [p.name for p in chosen("rope")] == ["program", "rope"]


def test_options_of_the_compiler_are_listed_and_those_it_refuses_with_its_words(bench, monkeypatch):
    table = ({"xla_backend_optimization_level": 2}, {"xla_gone": 1})
    facts = dataclasses.replace(platform_facts("cpu"), compiler_options=table)
    monkeypatch.setattr(compiler_options, "platform_facts", lambda _: facts)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    text = machine_probes.compiler_options(bench)
    found = bench.found["compiler_options"]
    assert found["values"] == table[0]
    assert "No such compile option: 'xla_gone'" in found["refused"]["xla_gone"]
    reason = found["refused"]["xla_gone"]
    assert text == f"xla_backend_optimization_level=2; left out: xla_gone ({reason})"
