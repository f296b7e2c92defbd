"""Sizes of a mesh, the reading of the two axis maps, and refusal of what does not fit."""

import pytest
from jax.sharding import PartitionSpec
from meshes import mesh_of
from refusal import refused

from llamajax.config.schema import MeshConfig, TrainConfig
from llamajax.sharding import ACTIVATIONS, AXES, WEIGHTS, axis_sizes, check_divides, spec


def test_minus_one_takes_the_devices_that_are_left():
    sizes = axis_sizes(MeshConfig(fsdp=-1, tensor=2), num_devices=8)
    assert sizes == {"data": 1, "stage": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
    assert tuple(sizes) == AXES


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 3}, {"fsdp": -1, "tensor": 3}, {"data": -1, "fsdp": -1}, {"fsdp": 16}]
)
def test_a_product_that_is_not_the_number_of_devices_is_refused(sizes):
    with refused("8 devices"):
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


DIMS = {"V": 128, "D": 16, "F": 24, "N": 8, "K": 4, "H": 4, "L": 4}
FITS = {"batch": 8, "seq_len": 16}


def check(mesh, **wrong):
    dims = DIMS | {k: wrong.pop(k) for k in list(wrong) if k in DIMS}
    sizes = {k: wrong.pop(k, v) for k, v in FITS.items()}
    train = TrainConfig(steps=1, seed=0, dtype="float32", **wrong)
    check_divides(dims, mesh_of(**mesh), **sizes, train=train)


@pytest.mark.parametrize(
    ("mesh", "wrong", "message"),
    [
        ({"tensor": 8}, {}, "num_kv_heads = 4 does not divide over mesh.tensor = 8; choose "
         "mesh.tensor among the divisors of 4, the nearest are 4 and 2"),
        ({"fsdp": 4}, {"D": 18}, "hidden_size = 18 does not divide over mesh.fsdp = 4; choose "
         "mesh.fsdp among the divisors of 18, the nearest are 3 and 2"),
        ({"data": 2, "stage": 4}, {"batch": 12}, "global_batch_size = 12 does not divide by "
         "mesh.data x mesh.fsdp x mesh.stage = 8; make it 8 or 16"),
        ({"stage": 2}, {"microbatch_size": 3}, "mesh.stage x train.microbatch_size = 6; make it 6 "
         "or 12"),
        ({"sequence": 2}, {"seq_len": 18}, "data.seq_len = 18 does not divide by 4 (mesh.sequence "
         "= 2 gives each device two pieces of a sample"),
        ({"sequence": 2, "tensor": 4}, {"seq_len": 12}, "data.seq_len = 12 does not divide by 8"),
        ({"tensor": 4}, {"seq_len": 18}, "make it 16 or 20"),
        ({"stage": 8}, {}, "model.num_layers = 4 is less than mesh.stage = 8"),
        ({"stage": 2}, {"pipeline_rounds": 4}, "less than mesh.stage x train.pipeline_rounds = 8"),
        ({"data": 2}, {"pipeline_rounds": 2}, "train.pipeline_rounds = 2 is for a pipeline"),
        ({"data": 2}, {"microbatch_size": 2}, "train.microbatch_size = 2 is for a pipeline"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_mesh_is_refused_with_the_nearest_fit(mesh, wrong, message):
    with refused(message) as lines:
        check(mesh, **wrong)
    assert sum(line.startswith("  - ") for line in lines) <= 1, "one reason was given"


def test_several_reasons_come_together():
    names = ("hidden_size = 15", "intermediate_size = 23", "num_heads = 7", "num_kv_heads = 3")
    wrong = {"V": 129, "D": 15, "F": 23, "N": 7, "K": 3, "batch": 9, "seq_len": 15}
    with refused("= 129", *names, "global_batch_size = 9", "seq_len = 15"):
        check({"fsdp": 2, "tensor": 2, "stage": 2}, **wrong)


def test_what_divides_passes_and_layers_need_not_divide_over_stages():
    check({"fsdp": 2, "tensor": 4}, batch=8, accumulation_steps=4)
    check({"stage": 2, "data": 2}, L=3)
