"""A compiled program's text: collectives in loops, groups of devices, mesh axes, bytes sent."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llamajax.planning.hlo import Collective, Program, bytes_of
from llamajax.planning.hlo_overlap import waited_s
from llamajax.planning.hlo_products import product_flops
from llamajax.planning.traffic import (
    axes_of_groups,
    device_groups,
    ring_bytes,
    slice_groups,
    slow_share,
    traffic,
)

PROGRAMS = Path(__file__).with_name("programs")
# A loop of 5 turns inside one of 4, the second counting from 1 to 5, as libtpu writes loops: no
# trip count beside them.
NESTED = (PROGRAMS / "nested.hlo").read_text()
# One gather that libtpu hides behind two fusions: three computations name it, one starts it.
CHAIN = (PROGRAMS / "chain.hlo").read_text()
# Between slices libtpu hands arrays to the hosts; an attribute says what they do.
SLICES = (PROGRAMS / "slices.hlo").read_text()


@pytest.mark.parametrize(
    ("target", "word", "kind"),
    [
        ("{1,2}x{0:3}", "ALL_REDUCE", "all-reduce"),
        ("{{100000,300000},{100001,300001}}", "REDUCE_SCATTER", "reduce-scatter"),
        ("{{100000->200000},{200000->100000}}", "ONE_TO_ONE", "collective-permute"),
    ],
)
def test_what_hosts_send_between_slices_is_a_collective(target, word, kind):
    written = target if target.startswith("{{") else f'"{target}"'
    (found,) = Program(SLICES.replace("TARGET", written).replace("KIND", word)).collectives()
    assert found == Collective(kind, target, "f32", 1024, count=3, between_slices=True)


def test_nested_loops_without_trip_counts_are_read_from_their_conditions():
    (found,) = Program(NESTED).collectives()
    assert found == Collective("all-reduce", "[4,2]<=[8]", "bf16", 2048, count=4 * 5)
    unreadable = NESTED.replace("%limit = s32[]{:T(128)} constant(5)", "%limit = s32[] copy(%i)")
    with pytest.raises(ValueError, match="trip count"):
        Program(unreadable).collectives()


def test_a_gather_hidden_behind_fusions_counts_once():
    (found,) = Program(CHAIN).collectives()
    assert (found.kind, found.operand_bytes, found.count) == ("all-gather", 256, 1)


def test_a_limit_in_a_fused_comparison_is_read():
    """As XLA for GPUs writes a loop whose first turn was pipelined out of it."""
    fused = NESTED.replace(
        "%limit = s32[]{:T(128)} constant(5)", "%limit = s32[] fusion(%i), calls=%fused_limit"
    )
    fused += "\n%fused_limit (p: s32[]) -> s32[] {\n  ROOT %five = s32[] constant(5)\n}\n"
    (found,) = Program(fused).collectives()
    assert found.count == 4 * 5


def test_of_a_condition_the_branch_of_true_runs():
    mesh = jax.make_mesh((8,), ("a",))

    def local(x, usual):
        def rare(x):
            return jax.lax.psum(jax.lax.psum(x, "a") * x, "a")

        return jax.lax.cond(usual, lambda x: jax.lax.psum(x, "a"), rare, x)

    spec = PartitionSpec("a")
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False
    )
    x = jax.ShapeDtypeStruct((8, 256), jnp.float32, sharding=NamedSharding(mesh, spec))
    text = jax.jit(run).lower(x, jax.ShapeDtypeStruct((), bool)).compile().as_text()
    assert text.count(" all-reduce(") == 3
    assert [row.calls for row in traffic(Program(text), mesh, [0] * 8)] == [1]


# Three turns of a gather beside a product and of a sum that nothing hides, in launch order: as XLA
# for GPUs writes it; as libtpu gives the gather to a SparseCore (its operand follows the start),
# to a chain of fusions (and the sum to a fusion), and to the hosts of two slices.
@pytest.mark.parametrize("kind", ["", "_on_sparse_cores", "_in_fusions", "_between_slices"])
@pytest.mark.parametrize(("product_s", "waited"), [(4.0, 6.0), (10.0, 0.0), (25.0, 0.0)])
def test_a_collective_waits_for_what_no_product_beside_it_hides(product_s, waited, kind):
    program = Program((PROGRAMS / f"launches{kind}.hlo").read_text())

    def route(collective):
        is_gather = collective.kind == "all-gather"
        return ("gather", 10.0) if is_gather else ("sum", 2.0)

    assert program.is_in_launch_order
    found = waited_s(program, route, product_s=product_s / (2 * 8 * 16 * 32), kernel_s=0.0)
    assert found["gather"] == pytest.approx(3 * waited)
    assert found["sum"] == pytest.approx(3 * 2.0)


def test_a_collective_of_what_another_one_gave_is_waited_for():
    text = """HloModule m, is_scheduled=true

ENTRY %main (a: f32[8]) -> f32[16] {
  %a = f32[8]{0} parameter(0)
  %copy = f32[8]{0} copy(%a)
  %gather = f32[16]{0} all-gather(%copy), replica_groups=[1,2]<=[2], dimensions={0}
  ROOT %sum = f32[16]{0} all-reduce(%gather), replica_groups=[1,2]<=[2], to_apply=%add
}
"""
    found = waited_s(Program(text), lambda c: (c.kind, 2.0), product_s=1.0, kernel_s=0.0)
    assert found == {"all-gather": 2.0, "all-reduce": 2.0}


# libtpu writes products as convolutions, batched ones with windows that are mostly holes
PRODUCTS = """HloModule m

ENTRY %main (a: bf16[8,16], b: bf16[16,32], c: f32[4,8,16], d: f32[4,16,32]) -> f32[] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  %c = f32[4,8,16]{2,1,0} parameter(2)
  %d = f32[4,16,32]{2,1,0} parameter(3)
  CALL
}
"""


@pytest.mark.parametrize(
    ("call", "flops"),
    [
        ("%r = f32[8,32]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
         2 * 8 * 16 * 32),
        ('%r = (bf16[8,32]{1,0}, s8[99]{0}) custom-call(%a, %b), custom_call_target='
         '"__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
         '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
         2 * 8 * 16 * 32),
        ('%r = f32[8,32]{1,0} custom-call(%a, %b), custom_call_target="__cudnn$fmhaSoftmax"', 0),
        ("%r = f32[8,32]{1,0} convolution(%a, %b), dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
        ("%r = f32[4,8,32]{2,1,0} convolution(%c, %d), window={size=4 stride=3 pad=0_0 "
         "lhs_dilate=4}, dim_labels=0bf_0io->0bf", 2 * 4 * 8 * 16 * 32),
    ],
)  # fmt: skip
def test_products_are_counted_in_every_form(call, flops):
    assert product_flops(Program(PRODUCTS.replace("CALL", call))) == flops


@pytest.mark.parametrize(
    ("types", "size"),
    [
        ("f32[]", 4),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048),
        ("(f32[2]{0}, s32[3,5]{1,0}, /*index=2*/pred[7]{0})", 8 + 60 + 7),
        ("f8e4m3fn[16]{0}", 16),
    ],
)
def test_bytes_of_a_type(types, size):
    assert bytes_of(types) == size


def test_a_compiled_scan_of_scans_sends_as_often_as_it_turns():
    mesh = jax.make_mesh((2, 4), ("a", "b"))

    def turn(x, _):
        return jax.lax.psum(x, "b") * 0.5, None

    def local(x):
        def outer(x, _):
            return jax.lax.scan(turn, x, None, length=3)[0] + 1, None

        return jax.lax.scan(outer, jax.lax.psum(x, "a"), None, length=7)[0]

    spec = PartitionSpec(("a", "b"))
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jax.ShapeDtypeStruct((8, 256), jnp.float32, sharding=NamedSharding(mesh, spec))
    rows = traffic(Program(run.lower(x).compile().as_text()), mesh, [0] * 8)
    found = {row.axes: (row.kind, row.calls, row.sent_bytes) for row in rows}
    assert found == {
        ("a",): ("all-reduce", 1, 2 * 1 / 2 * 1024),
        ("b",): ("all-reduce", 21, 21 * 2 * 3 / 4 * 1024),
    }


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("{{0,1},{1,2},{2,3},{3,0}}", [[0, 1], [1, 2], [2, 3], [3, 0]]),
    ],
)
def test_groups_are_read_in_every_form(text, groups):
    assert device_groups(text, 4) == groups


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{1,2}x{0:1}", [[0, 2], [1, 3]]),
        ("{1,2}x{0,1}", [[0, 2], [1, 3]]),
        ("{{100000,200001},{100001,200000}}", [[0, 3], [1, 2]]),
        ("{{100000->200000},{200000->100000}}", [[0, 2], [2, 0]]),
    ],
)
def test_groups_of_hosts_of_slices_are_read(text, groups):
    positions = {100000: 0, 100001: 1, 200000: 2, 200001: 3}
    assert slice_groups(text, positions) == groups


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("[8,2]<=[16]", ("tensor",)),
        ("[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",)),
        ("[8,2]<=[2,8]T(1,0)", ("data",)),
        ("[2,8]<=[8,2]T(1,0)", ("data", "fsdp")),
        ("[16,1]<=[16]", ()),
    ],
)
def test_groups_belong_to_the_axes_along_which_they_differ(text, axes):
    sizes = {"data": 2, "fsdp": 4, "tensor": 2}
    assert axes_of_groups(device_groups(text, 16), sizes) == axes


@pytest.mark.parametrize(
    ("pairs", "sent"),
    [
        ([[n, (n + 1) % 8] for n in range(8)], 100),
        ([[n, min(n + 1, 7)] for n in range(8)], 7 / 8 * 100),
    ],
)
def test_only_the_sources_of_a_permutation_send(pairs, sent):
    collective = Collective("collective-permute", "", "f32", operand_bytes=100, count=1)
    assert ring_bytes(collective, pairs, 8) == sent


@pytest.mark.parametrize(
    ("kind", "groups", "share"),
    [
        ("all-gather", [[0, 1], [2, 3]], 0),
        ("all-gather", [[0, 2], [1, 3]], 1),
        ("all-reduce", [[0, 1, 2, 3]], 1 / 2),
        ("collective-permute", [[0, 1], [1, 2], [2, 3], [3, 0]], 1 / 2),
        ("collective-permute", [[0, 0], [1, 1]], 0),
    ],
)
def test_rings_leave_a_node_once(kind, groups, share):
    assert slow_share(kind, groups, [0, 0, 1, 1]) == share
