"""Devices of several nodes, made up: the axes that talk most stay inside a node."""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from llamajax.sharding.axes import AXES
from llamajax.sharding.placement import placed, spans, table


@dataclasses.dataclass(frozen=True)
class Device:
    """What the placement looks at."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"


def nodes_of(count: int, each: int, *, slices: bool = False) -> list[Device]:
    """Devices node by node, but in an order that helps nobody."""
    made = [Device(i, i // each, i // each if slices else None) for i in range(count * each)]
    return made[::2] + made[1::2]


def mesh_over(devices, **sizes) -> Mesh:
    whole = {axis: sizes.get(axis, 1) for axis in AXES}
    mesh = object.__new__(Mesh)  # a Mesh of devices that are not JAX's
    object.__setattr__(mesh, "devices", placed(whole, devices))
    object.__setattr__(mesh, "axis_names", tuple(whole))
    return mesh


def test_tensor_stays_inside_and_stages_cross():
    mesh = mesh_over(nodes_of(8, 8), stage=8, tensor=8)
    assert spans(mesh) == {"stage": 8, "tensor": 1}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(64))


def test_an_axis_may_lie_half_across():
    mesh = mesh_over(nodes_of(2, 4, slices=True), fsdp=4, tensor=2)
    assert spans(mesh) == {"fsdp": 2, "tensor": 1}
    lines = table(mesh)
    assert lines[0].split() == ["fsdp", "4", "across", "2", "nodes,", "2", "in", "each"]
    assert lines[1].split() == ["tensor", "2", "inside", "a", "node"]


def test_tensor_that_does_not_fit_is_called_slow():
    mesh = mesh_over(nodes_of(2, 4), tensor=8)
    assert "slow" in table(mesh)[0]


def test_nodes_of_unlike_size_keep_neighbours_together():
    devices = [*nodes_of(2, 4)[:7], Device(9, 9)]
    mesh = mesh_over(devices, data=4, tensor=2)
    assert mesh.devices.shape == (4, 1, 1, 1, 2)
    assert len(set(np.ravel(mesh.devices))) == 8


def test_one_node_needs_no_table():
    assert table(mesh_over(nodes_of(1, 8), fsdp=8)) == []
