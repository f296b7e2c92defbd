"""Refusal of a mesh that does not fit, with all reasons and the nearest that fits."""

import pytest
from meshes import mesh_of

from llamajax.config.schema import TrainConfig
from llamajax.errors import UserError
from llamajax.sharding import check_divides

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
    with pytest.raises(UserError) as caught:
        check(mesh, **wrong)
    assert message in str(caught.value)
    assert str(caught.value).count("\n  - ") <= 1, "one reason was given"


def test_several_reasons_come_together():
    with pytest.raises(UserError) as caught:
        check(
            {"fsdp": 2, "tensor": 2, "stage": 2}, V=129, D=15, F=23, N=7, K=3, batch=9, seq_len=15
        )
    for name in (
        "= 129", "hidden_size = 15", "intermediate_size = 23", "num_heads = 7", "num_kv_heads = 3",
        "global_batch_size = 9", "seq_len = 15",
    ):  # fmt: skip
        assert name in str(caught.value)


def test_what_divides_passes_and_layers_need_not_divide_over_stages():
    check({"fsdp": 2, "tensor": 4}, batch=8, accumulation_steps=4)
    check({"stage": 2, "data": 2}, L=3)
