"""Plans for TPUs and GPUs that are not here, by their own compilers, as a user runs them."""

import json
import os
from pathlib import Path

import pytest
from compilers import needs_cuda, needs_tpu
from shell import shell

CONFIG = str(Path(__file__).with_name("small_run.py"))
BF16 = (
    "--config.train.dtype=bfloat16", "--config.model.hidden_size=256",
    "--config.model.num_heads=4", "--config.model.head_size=64", "--config.data.seq_len=128",
    "--config.train.attention=auto",
)  # fmt: skip
pytestmark = pytest.mark.slow


def planned(tmp_path, devices, *overrides):
    out = tmp_path / "plan.json"
    flags = (f"--config={CONFIG}", f"--devices={devices}", f"--json={out}")
    environ = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = shell("plan", *flags, *overrides, env=environ)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


@needs_tpu
def test_a_tpu_step_is_compiled_with_its_own_attention(tmp_path):
    plan = planned(tmp_path, "v5e:2x4", *BF16)
    assert (plan["device_kind"], plan["attention"]) == ("TPU v5 lite", "splash")
    assert plan["compiled_product_flops"] == pytest.approx(plan["expected_product_flops"], rel=0.03)
    assert plan["compiler_options"]["xla_tpu_scoped_vmem_limit_kib"] == 98304
    assert plan["fits"] is True
    assert plan["limit_bytes"] == int(15.75 * 2**30)
    assert plan["arguments_bytes"] < plan["peak_bytes"] < plan["limit_bytes"]
    kinds = {(row["kind"], *row["axes"], row["dtype"]) for row in plan["collectives"]}
    assert ("all-gather", "fsdp", "bf16") in kinds
    assert ("reduce-scatter", "fsdp", "f32") in kinds
    assert plan["tokens_per_s"] > 0


@needs_tpu
def test_offloaded_moments_are_kept_in_the_host_of_a_tpu(tmp_path):
    # enough of activations that the backward pass needs the most
    long = (*BF16, "--config.data.seq_len=1024", "--config.model.max_seq_len=1024")
    here = planned(tmp_path, "v5e:2x4", *long)
    there = planned(tmp_path, "v5e:2x4", *long, "--config.optim.offload=true")
    assert here["host_bytes"] == 0
    moments = there["optimizer_bytes"] - 4096  # counters stay on the device
    assert there["host_bytes"] >= moments
    assert here["arguments_bytes"] - there["arguments_bytes"] >= moments
    # fetched behind the backward pass, whose memory they then use again
    assert here["peak_bytes"] - there["peak_bytes"] > 0.8 * moments


@needs_tpu
def test_a_program_that_libtpu_refuses_does_not_fit(tmp_path):
    plan = planned(
        tmp_path, "v5e:1x1", *BF16, "--config.mesh.fsdp=1", "--config.mesh.tensor=1",
        "--config.model.vocab_size=4000000",
    )  # fmt: skip
    assert plan["fits"] is False
    assert plan["peak_bytes"] is None or plan["peak_bytes"] > plan["limit_bytes"]
    assert plan["limit_bytes"] == int(15.75 * 2**30)


@needs_tpu
def test_only_data_and_stage_communicate_between_slices_of_tpus(tmp_path):
    plan = planned(
        tmp_path, "4*v5e:2x2", *BF16, "--config.mesh.data=2", "--config.mesh.stage=2",
        "--config.mesh.tensor=1", "--config.data.global_batch_size=32",
    )  # fmt: skip
    between = {row["axes"][0] for row in plan["collectives"] if row["slow_bytes"]}
    assert between == {"data", "stage"}
    assert plan["slow_bytes"]["data"] == plan["collective_bytes"]["data"] > 0
    assert plan["slow_bytes"]["stage"] == plan["collective_bytes"]["stage"] > 0
    assert plan["slow_bytes"]["fsdp"] == 0 < plan["collective_bytes"]["fsdp"]
    assert plan["terms"]["links_s"]["data"] == pytest.approx(plan["slow_bytes"]["data"] / 3.125e9)


@needs_cuda
def test_traffic_between_nodes_of_gpus(tmp_path):
    # fsdp 4 x tensor 2: two of fsdp in each node. With `full` XLA runs the recomputed products of
    # query, key, value and out twice in two of three layers.
    plan = planned(tmp_path, "h100:2x4", *BF16, "--config.train.remat=dots")
    assert plan["slow_bytes"]["tensor"] == 0 < plan["collective_bytes"]["tensor"]
    assert plan["slow_bytes"]["fsdp"] == pytest.approx(plan["collective_bytes"]["fsdp"] / 2)
    assert plan["device_kind"].startswith("NVIDIA H100")
    assert (plan["attention"], plan["attention_reason"]) == ("cudnn", "the first choice on gpu")
    assert plan["compiled_product_flops"] == pytest.approx(plan["expected_product_flops"], rel=0.03)
    options = plan["compiler_options"]
    assert options["xla_disable_hlo_passes"] == "rematerialization"
    assert options["xla_gpu_all_gather_combine_threshold_bytes"] == 2**30
    assert not any("left out" in note for note in plan["notes"])
    assert all(row["waits_s"] is not None for row in plan["collectives"])
    assert plan["fits"] is True
    assert plan["arguments_bytes"] < plan["peak_bytes"] < plan["limit_bytes"]


@needs_cuda
def test_products_in_8_bits_take_no_second_copy_of_the_weights(tmp_path):
    """GPUs want an operand transposed; XLA transposed the layers all at once, in float32."""
    small = (
        *BF16, "--config.mesh.fsdp=1", "--config.mesh.tensor=1", "--config.model.num_layers=6",
        "--config.train.attention=blocked",
    )  # fmt: skip
    wide = planned(tmp_path, "h200:1", *small)
    for scaling in ("tensor", "row"):
        float8 = ("--config.train.dtype=float8", f"--config.train.float8_scaling={scaling}")
        narrow = planned(tmp_path, "h200:1", *small, *float8)
        more = narrow["activations_bytes"] - wide["activations_bytes"]
        assert more < 0.3 * wide["params_bytes"], scaling
