"""Sizes of a mesh, what divides over it, and the reading of the two axis maps."""

import jax
import pytest
from jax.sharding import PartitionSpec

from llamajax.config.schema import MeshConfig
from llamajax.errors import UserError
from llamajax.sharding import (
    ACTIVATIONS,
    AXES,
    WEIGHTS,
    axis_sizes,
    build_mesh,
    check_divides,
    spec,
)

DIMS = {"V": 128, "D": 16, "F": 24, "N": 8, "K": 4, "H": 4, "L": 2}


def mesh_of(**sizes: int):
    config = MeshConfig(**sizes)
    count = sizes.get("data", 1) * sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    return build_mesh(config, jax.devices()[:count])


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


def test_every_size_that_does_not_divide_is_named_at_once():
    dims = DIMS | {"V": 129, "D": 15, "F": 23, "N": 7, "K": 3}
    with pytest.raises(UserError) as caught:
        check_divides(dims, mesh_of(fsdp=2, tensor=4), batch=9, accumulation=2)
    text = str(caught.value)
    for wanted in ("= 129", "hidden_size = 15", "intermediate_size = 23", "num_heads = 7"):
        assert wanted in text
    for wanted in ("num_kv_heads = 3", "global_batch_size = 9", "make it 8 or 12"):
        assert wanted in text


def test_sizes_that_divide_pass():
    check_divides(DIMS, mesh_of(fsdp=2, tensor=4), batch=8, accumulation=4)
