"""Made-up devices of several nodes: the axes that communicate most stay inside a node."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import Mesh

from llamajax.errors import UserError
from llamajax.sharding.axes import AXES
from llamajax.sharding.device_order import (
    check_slices,
    device_order_table,
    node_numbers,
    node_of,
    nodes_per_axis,
    order_devices,
)


@dataclasses.dataclass(frozen=True)
class Device:
    """What the order of devices depends on."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"


@dataclasses.dataclass(frozen=True)
class Core(Device):
    """A core of a TPU."""

    platform: str = "tpu"
    device_kind: str = "TPU v5p"
    core_on_chip: int = 0


def nodes_of(count: int, each: int, *, slices: bool = False) -> list[Device]:
    """Devices of nodes, in an order that does not follow the nodes."""
    made = [Device(i, i // each, i // each if slices else None) for i in range(count * each)]
    return made[::2] + made[1::2]


def all_axes(sizes: dict[str, int]) -> dict[str, int]:
    return {axis: sizes.get(axis, 1) for axis in AXES}


def mesh_over(devices, **sizes) -> Mesh:
    mesh = object.__new__(Mesh)  # a Mesh of devices that are not JAX's
    object.__setattr__(mesh, "devices", order_devices(all_axes(sizes), devices))
    object.__setattr__(mesh, "axis_names", AXES)
    return mesh


def test_tensor_stays_inside_and_stages_cross():
    mesh = mesh_over(nodes_of(8, 8), stage=8, tensor=8)
    assert nodes_per_axis(mesh) == {"stage": 8, "tensor": 1}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(64))


def test_an_axis_may_lie_half_across():
    mesh = mesh_over(nodes_of(2, 4, slices=True), fsdp=4, tensor=2)
    assert nodes_per_axis(mesh) == {"fsdp": 2, "tensor": 1}
    lines = [" ".join(line.split()) for line in device_order_table(mesh)]
    assert lines == ["fsdp 4 across 2 nodes, 2 in each", "tensor 2 inside a node"]
    assert "slow" in device_order_table(mesh_over(nodes_of(2, 4), tensor=8))[0]
    assert device_order_table(mesh_over(nodes_of(1, 8), fsdp=8)) == []


def test_nodes_of_unlike_size_keep_neighbors_together():
    devices = [*nodes_of(2, 4)[:7], Device(9, 9)]
    mesh = mesh_over(devices, data=4, tensor=2)
    assert mesh.devices.shape == (4, 1, 1, 1, 2)
    assert len(set(np.ravel(mesh.devices))) == 8


def test_hosts_of_one_slice_of_tpus_are_one_node():
    """JAX says no slice where there is one only; its hosts are joined by the links of its chips."""
    assert {node_of(Core(i, i // 4)) for i in range(8)} == {0}
    assert {node_of(Device(i, i // 4)) for i in range(8)} == {0, 1}


@pytest.mark.parametrize(
    ("count", "each", "sizes"),
    [
        (2, 4, {"data": 2, "tensor": 4}),
        (2, 4, {"fsdp": 4, "tensor": 2}),
        (4, 4, {"data": 2, "stage": 2, "fsdp": 4}),
        (2, 4, {"tensor": 8}),
        (3, 4, {"data": 2, "fsdp": 6}),
        (1, 8, {"fsdp": 8}),
    ],
)
def test_nodes_are_known_without_placing_devices(count, each, sizes):
    devices, sizes = nodes_of(count, each, slices=True), all_axes(sizes)
    assert node_numbers(sizes, devices) == [node_of(d) for d in order_devices(sizes, devices).flat]


def slices_of_tpus(count, each):
    return [
        Core((1 + s) * 100_000 + i, s * each // 4 + i // 4, s)
        for s in range(count)
        for i in range(each)
    ]


@pytest.mark.parametrize(
    ("count", "each", "sizes", "words"),
    [
        (2, 8, {"fsdp": 16}, "fsdp 16 does not fit into one of 2 slices of 8 .*data=2 mesh.fsdp=8"),
        (2, 8, {"fsdp": 4, "tensor": 4}, "multiple of 2: for example mesh.data=2 mesh.fsdp=2"),
        (4, 4, {"data": 2, "sequence": 8}, "for example mesh.data=4 mesh.sequence=4"),
        (3, 4, {"data": 2, "tensor": 2}, "multiple of 3: choose another number of slices"),
    ],
)
def test_what_talks_in_every_layer_stays_inside_a_slice(count, each, sizes, words):
    with pytest.raises(UserError, match=words):
        check_slices(all_axes(sizes), slices_of_tpus(count, each))


def test_what_may_cross_slices_does():
    for sizes in ({"data": 2, "fsdp": 8}, {"stage": 2, "tensor": 8}, {"data": 4, "tensor": 4}):
        check_slices(all_axes(sizes), slices_of_tpus(2, 8))
    check_slices(all_axes({"fsdp": 16}), nodes_of(2, 8, slices=True))
