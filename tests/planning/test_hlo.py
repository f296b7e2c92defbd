"""A compiled program's text: collectives in loops, groups of devices, mesh axes, bytes sent."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llamajax.planning.compilation import traffic
from llamajax.planning.hlo import (
    Collective,
    axes_of_groups,
    bytes_of,
    collectives,
    device_groups,
    ring_bytes,
    slice_groups,
    slow_share,
)

# A loop of 5 turns inside one of 4, the second counting from 1 to 5, as libtpu writes loops: no
# trip count beside them.
NESTED = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%inner_condition (p: (s32[], bf16[8,128])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%inner_body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %y = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} all-reduce(%x), channel_id=1, replica_groups=[4,2]<=[8], use_global_device_ids=true, to_apply=%add, metadata={op_name="a(b)" stack_frame_id=1}
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%next, %y)
}

%outer_condition (p: (s32[], bf16[8,128])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%outer_body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%zero, %x)
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%start), condition=%inner_condition, body=%inner_body
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%next, %y)
}

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %first = s32[]{:T(128)} constant(1)
  %copied = s32[]{:T(128)} copy(%first)
  %start = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%copied, %x)
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%start), condition=%outer_condition, body=%outer_body
  ROOT %y = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501

# One gather that libtpu hides behind two fusions: three computations name it, one starts it.
CHAIN = """HloModule jit_step

%starts (p: bf16[1,128]) -> (bf16[1,128], bf16[4,128]) {
  %p = bf16[1,128]{1,0} parameter(0)
  %g = bf16[4,128]{1,0} all-gather(%p), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %s = (bf16[1,128]{1,0}, bf16[4,128]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%goes_on (p: bf16[1,128]) -> bf16[4,128] {
  %p = bf16[1,128]{1,0} parameter(0)
  ROOT %g = bf16[4,128]{1,0} all-gather(%p), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%ends (p: bf16[1,128]) -> bf16[4,128] {
  %p = bf16[1,128]{1,0} parameter(0)
  %g = bf16[4,128]{1,0} all-gather(%p), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %d = bf16[4,128]{1,0} custom-call(%p, %g), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[1,128]) -> bf16[4,128] {
  %x = bf16[1,128]{1,0} parameter(0)
  %a = (bf16[1,128]{1,0}, bf16[4,128]{1,0}) fusion(%x), kind=kCustom, calls=%starts
  %b = bf16[4,128]{1,0} fusion(%x), kind=kCustom, calls=%goes_on
  ROOT %c = bf16[4,128]{1,0} fusion(%x), kind=kCustom, calls=%ends
}
"""  # noqa: E501


# Between slices libtpu hands arrays to the hosts; what they do stands in an attribute.
SLICES = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[2,128])) -> (s32[], f32[2,128]) {
  %p = (s32[]{:T(128)}, f32[2,128]{1,0:T(2,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[2,128]{1,0:T(2,128)} get-tuple-element(%p), index=1
  %after = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="psum.1_0"}
  %send = (f32[2,128]{1,0:T(2,128)}, u32[], token[]) send(%x, %after), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="psum.1_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target=TARGET,_xla_megascale_transfer_type="KIND"}, backend_config={}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv = (f32[2,128]{1,0:T(2,128)}, u32[], token[]) recv(%after), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="psum.1_0",_xla_megascale_target=TARGET,_xla_megascale_transfer_type="KIND"}
  %done = (f32[2,128]{1,0:T(2,128)}, token[]) recv-done(%recv), channel_id=3, is_host_transfer=true
  %y = f32[2,128]{1,0:T(2,128)} get-tuple-element(%done), index=0
  ROOT %t = (s32[]{:T(128)}, f32[2,128]{1,0:T(2,128)}) tuple(%i, %y)
}

%condition (p: (s32[], f32[2,128])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[2,128]{1,0:T(2,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[2,128]) -> f32[2,128] {
  %x = f32[2,128]{1,0:T(2,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[2,128]{1,0:T(2,128)}) tuple(%zero, %x)
  %loop = (s32[]{:T(128)}, f32[2,128]{1,0:T(2,128)}) while(%start), condition=%condition, body=%body
  ROOT %r = f32[2,128]{1,0:T(2,128)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


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
    (found,) = collectives(SLICES.replace("TARGET", written).replace("KIND", word))
    assert found == Collective(kind, target, "f32", 1024, count=3, between_slices=True)


def test_nested_loops_without_trip_counts_are_read_from_their_conditions():
    (found,) = collectives(NESTED)
    assert found == Collective("all-reduce", "[4,2]<=[8]", "bf16", 2048, count=4 * 5)
    unreadable = NESTED.replace("%limit = s32[]{:T(128)} constant(5)", "%limit = s32[] copy(%i)")
    with pytest.raises(ValueError, match="trip count"):
        collectives(unreadable)


def test_a_gather_hidden_behind_fusions_counts_once():
    (found,) = collectives(CHAIN)
    assert (found.kind, found.operand_bytes, found.count) == ("all-gather", 256, 1)


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
        outer = lambda x, _: (jax.lax.scan(turn, x, None, length=3)[0] + 1, None)  # noqa: E731
        return jax.lax.scan(outer, jax.lax.psum(x, "a"), None, length=7)[0]

    spec = PartitionSpec(("a", "b"))
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jax.ShapeDtypeStruct((8, 256), jnp.float32, sharding=NamedSharding(mesh, spec))
    rows = traffic(run.lower(x).compile().as_text(), mesh)
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
    ("kind", "groups", "sent"),
    [
        ("all-gather", [[0, 1, 2, 3], [4, 5, 6, 7]], 3 * 100),
        ("reduce-scatter", [[0, 1, 2, 3], [4, 5, 6, 7]], 3 / 4 * 100),
        ("all-to-all", [[0, 1, 2, 3], [4, 5, 6, 7]], 3 / 4 * 100),
        ("all-reduce", [[0, 1, 2, 3], [4, 5, 6, 7]], 2 * 3 / 4 * 100),
        ("collective-permute", [[n, (n + 1) % 8] for n in range(8)], 100),
        ("collective-permute", [[n, min(n + 1, 7)] for n in range(8)], 7 / 8 * 100),
    ],
)
def test_a_ring_sends_that_many_bytes(kind, groups, sent):
    collective = Collective(kind, "", "f32", operand_bytes=100, count=1)
    assert ring_bytes(collective, groups, 8) == sent


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
