"""Compiled programs as text: collectives inside loops count as often as the loops turn."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llamajax.planning.compilation import traffic
from llamajax.planning.hlo import bytes_of, collectives

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
    ("target", "told", "kind", "groups"),
    [
        ('"{1,2}x{0:3}"', "ALL_REDUCE", "all-reduce", "{1,2}x{0:3}"),
        ("{{100000,300000},{100001,300001}}", "REDUCE_SCATTER", "reduce-scatter", None),
        ("{{100000->200000},{200000->100000}}", "ONE_TO_ONE", "collective-permute", None),
    ],
)
def test_what_hosts_send_between_slices_is_a_collective(target, told, kind, groups):
    (found,) = collectives(SLICES.replace("TARGET", target).replace("KIND", told))
    assert (found.kind, found.dtype, found.operand_bytes, found.count) == (kind, "f32", 1024, 3)
    assert found.between_slices
    assert found.groups == (groups or target)


def test_nested_loops_without_trip_counts_are_read_from_their_conditions():
    (found,) = collectives(NESTED)
    assert (found.kind, found.dtype, found.operand_bytes) == ("all-reduce", "bf16", 2048)
    assert found.count == 4 * 5
    assert found.groups == "[4,2]<=[8]"


def test_a_gather_hidden_behind_fusions_counts_once():
    (found,) = collectives(CHAIN)
    assert (found.kind, found.operand_bytes, found.count) == ("all-gather", 256, 1)


def test_a_loop_whose_condition_says_nothing_is_an_error():
    unreadable = NESTED.replace("%limit = s32[]{:T(128)} constant(5)", "%limit = s32[] copy(%i)")
    with pytest.raises(ValueError, match="trip count"):
        collectives(unreadable)


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
