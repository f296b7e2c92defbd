"""KIND:SHAPE is read into devices, or refused with what to write instead."""

import re

import jax
import pytest
from compilers import HAS_CUDA, HAS_TPU, needs_cuda, needs_tpu
from refusal import refused

from llamajax import sharding
from llamajax.backends import absent_devices, topologies
from llamajax.backends.devices import GPU_MEMORY_FRACTION
from llamajax.config import BackendConfig
from llamajax.planning.compilation import node_of


def test_cpu_devices_are_virtual_ones():
    target = absent_devices("cpu:4", BackendConfig())
    machine = target.machine
    assert (len(target.devices), machine.platform, target.entry) == (4, "cpu", None)
    assert machine.num_devices == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h10:8", "did you mean h100?"),
        ("v5x:4x4", "did you mean v5"),
        ("cpu", "write KIND:SHAPE"),
        ("cpu:", "write KIND:SHAPE"),
        ("cpu:x", "is not a shape"),
        ("cpu:0", "is not a shape"),
        ("cpu:2x4", "cpu takes one number"),
        ("h100:12", "choose N = 8 or 16"),
        ("h200:2x2x2", "hosts x devices"),
        ("v5e:8", "two sides"),
        ("v5p:2x4", "three sides"),
        ("v5e:3x3", "hosts of 2x2"),
        ("2*cpu:4", "write cpu:4"),
        ("2*npu:4", "write npu:4"),
        ("two*h100:8", "2*v5p:4x4x4, h200:64"),
    ],
)
def test_a_kind_or_shape_that_is_none_is_named(text, words):
    with refused(f"--devices={text}", words):
        absent_devices(text, BackendConfig())


def test_a_plugins_shape_is_passed_on_as_it_is_written(monkeypatch):
    def refuse(name, platform):
        raise jax.errors.JaxRuntimeError(f"{platform} has no {name!r}")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    with refused("--devices=npu: Two Boxes", "plugin 'npu' has no topology 'Two Boxes': npu has"):
        absent_devices("npu: Two Boxes", BackendConfig())


@pytest.mark.parametrize(
    ("text", "extra"),
    [
        pytest.param("v5p:4x4x4", "plan-tpu", marks=pytest.mark.skipif(HAS_TPU, reason="there")),
        pytest.param("h100:8", "plan-gpu", marks=pytest.mark.skipif(HAS_CUDA, reason="there")),
    ],
)
def test_without_a_compiler_it_says_what_to_install(text, extra):
    with refused(extra):
        absent_devices(text, BackendConfig())


def test_a_gpu_program_may_take_what_the_environment_says(monkeypatch, table):
    h100, v5p = table["h100"], table["v5p"]
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert h100.limit_bytes == int(h100.xla_bytes * GPU_MEMORY_FRACTION)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    assert h100.limit_bytes == h100.xla_bytes // 2
    # without a device XLA's scheduler takes 80 % of this size for what a run's allocator may take
    told = re.search(r"device_memory_size: (\d+)", topologies._gpu_target("h100"))
    assert int(told[1]) * 80 // 100 == h100.limit_bytes
    assert v5p.limit_bytes == v5p.xla_bytes


@needs_tpu
def test_slices_of_tpus_are_nodes():
    target = absent_devices("2*v5e:2x2", BackendConfig())
    assert (target.text, len(target.devices)) == ("2*v5e:2x2", 8)
    assert [sharding.node_of(d) for d in target.devices] == [0] * 4 + [1] * 4
    assert {sharding.node_of(d) for d in absent_devices("v5e:2x4", BackendConfig()).devices} == {0}


@needs_cuda
@pytest.mark.parametrize(
    ("text", "nodes"), [("h100:2x4", 2), ("2*h100:2x2", 2), ("1*h100:2x4", 1), ("h100:8", 1)]
)
def test_hosts_of_gpus_are_nodes_unless_a_domain_joins_them(text, nodes):
    target = absent_devices(text, BackendConfig())
    numbers = [node_of(target)(device) for device in target.devices]
    assert numbers == [n for n in range(nodes) for _ in range(8 // nodes)]
