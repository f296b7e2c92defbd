"""Sizes of a mesh, and the reading of the two axis maps."""

import pytest
from jax.sharding import PartitionSpec
from meshes import mesh_of

from llamajax.config.schema import MeshConfig
from llamajax.errors import UserError
from llamajax.sharding import ACTIVATIONS, AXES, WEIGHTS, axis_sizes, spec


def test_minus_one_takes_the_devices_that_are_left():
    sizes = axis_sizes(MeshConfig(fsdp=-1, tensor=2), num_devices=8)
    assert sizes == {"data": 1, "stage": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
    assert tuple(sizes) == AXES


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 3}, {"fsdp": -1, "tensor": 3}, {"data": -1, "fsdp": -1}, {"fsdp": 16}]
)
def test_a_product_that_is_not_the_number_of_devices_is_refused(sizes):
    with pytest.raises(UserError, match="8 devices"):
        axis_sizes(MeshConfig(**sizes), num_devices=8)


def test_weights_and_activations_are_split_by_their_tables():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    assert spec("LDNH", WEIGHTS, mesh) == PartitionSpec(None, "fsdp", "tensor", None)
    assert spec("BTD", ACTIVATIONS, mesh) == PartitionSpec(("data", "fsdp"), None, None)


def test_an_axis_of_one_device_splits_nothing():
    assert spec("DNH", WEIGHTS, mesh_of(fsdp=8)) == PartitionSpec("fsdp", None, None)
    assert spec("BT", ACTIVATIONS, mesh_of(fsdp=8)) == PartitionSpec("fsdp", None)


def test_two_dims_on_one_axis_are_refused():
    with pytest.raises(ValueError, match="'NF'"):
        spec("NF", WEIGHTS, mesh_of(tensor=2))
