"""No program of a linear-memory attention holds anything of T x S elements."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from llamajax.ops.attention import attention, needs_unchecked

B, T, N, K, H = 1, 2048, 6, 2, 64  # no two other sizes multiply to T, in no block and no head group
SHAPES = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T))


def step(impl, packed=True):
    """Value and gradients of an attention, to be lowered."""

    def value_and_grads(q, k, v, segment_ids):
        ids = segment_ids if packed else None
        o, pull = jax.vjp(lambda *qkv: attention(*qkv, impl=impl, segment_ids_BT=ids), q, k, v)
        return o, *pull(o)

    return value_and_grads


def arguments(dtype, *, rows=B, sharding=None):
    dtypes = (dtype, dtype, dtype, jnp.int32)
    return [
        jax.ShapeDtypeStruct((rows, *shape[1:]), each, sharding=sharding)
        for shape, each in zip(SHAPES, dtypes, strict=True)
    ]


def shapes_in(text):
    """Shapes of all tensors in StableHLO (`tensor<2x3xf32>`) or HLO (`f32[2,3]{1,0}`) text."""
    found = set()
    for dims in re.findall(r"tensor<((?:\d+x)+)\w+>", text):
        found.add(tuple(int(d) for d in dims.rstrip("x").split("x")))
    for dims in re.findall(r"\b(?:f32|bf16|f16|pred|s32)\[([\d,]+)\]", text):
        found.add(tuple(int(d) for d in dims.split(",")))
    return found


def square(shapes):
    """Those that hold an entry for every query and key, however the two are laid out."""
    return [s for s in shapes if math.prod(s) >= T * T and sum(d >= T for d in s) >= 2]


@functools.cache
def lowered(impl, platform, packed):
    traced = jax.jit(step(impl, packed)).trace(*arguments(jnp.bfloat16))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@functools.cache
def compiled(impl):
    return jax.jit(step(impl)).trace(*arguments(jnp.float32)).lower().compile()


def memory_in_matrices(impl):
    """Temporary memory of the CPU's program, in float32 score matrices of all heads."""
    return compiled(impl).memory_analysis().temp_size_in_bytes / (4 * B * N * T * T)


@pytest.mark.parametrize("packed", [True, False])
def test_cudnn_takes_documents_as_offsets_and_no_matrix(packed):
    text = lowered("cudnn", "cuda", packed)
    forward, backward = r"__cudnn\$fmhaSoftmax\b", r"__cudnn\$fmhaSoftmaxBackward\b"
    assert len(re.findall(rf"custom_call @{forward}", text)) == 1
    assert len(re.findall(rf"custom_call @{backward}", text)) == 1
    assert "Bias" not in text
    assert ("PADDING_CAUSAL" in text) == packed
    assert '"CAUSAL"' in text.replace("\\22", '"') or packed
    call = next(line for line in text.splitlines() if re.search(rf"custom_call @{forward}", line))
    operands = call[call.rindex(" : (") :].split(" -> ")[0]
    assert operands.count("tensor<") == (7 if packed else 3)
    assert operands.count("xi32>") == (4 if packed else 0)
    assert square(shapes_in(text)) == []


def test_splash_takes_segment_ids_and_no_matrix():
    text = lowered("splash", "tpu", True)
    assert text.count("custom_call @tpu_custom_call") == 3  # forward, dq, dk and dv
    assert square(shapes_in(text)) == []


def test_blocked_holds_no_matrix_when_compiled():
    program = compiled("blocked")
    largest = max(math.prod(s) for s in shapes_in(program.as_text()))
    assert square(shapes_in(program.as_text())) == []
    assert largest <= N * T * T / 16  # one block of 128 queries against all keys
    assert memory_in_matrices("blocked") < 0.6


def test_the_check_sees_the_matrix_of_the_reference():
    assert square(shapes_in(lowered("xla", "cuda", True)))
    assert square(shapes_in(compiled("xla").as_text()))
    assert memory_in_matrices("xla") > 1


@pytest.mark.parametrize(("impl", "platform"), [("cudnn", "cuda"), ("splash", "tpu")])
def test_kernels_lower_inside_shard_map(impl, platform):
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec("data")
    placed = jax.sharding.NamedSharding(mesh, spec)
    args = arguments(jnp.bfloat16, rows=2, sharding=placed)

    def program(check_vma):
        f = jax.shard_map(step(impl), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
        return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()

    assert "custom_call" in program(False)
    if needs_unchecked(impl):
        with pytest.raises(ValueError, match="check_vma"):
            program(True)
    else:
        assert "custom_call" in program(True)


@pytest.mark.parametrize(
    ("impl", "platform", "target"),
    [("cudnn", "cuda", r"__cudnn\$fmhaSoftmax\b"), ("splash", "tpu", "tpu_custom_call")],
)
@pytest.mark.parametrize("names", [("attention",), ()], ids=["saved", "recomputed"])
def test_a_saved_kernel_does_not_run_again(impl, platform, target, names):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    block = jax.checkpoint(
        lambda *qkv, ids: attention(*qkv, impl=impl, segment_ids_BT=ids), policy=policy
    )
    q, k, v, ids = arguments(jnp.bfloat16)

    def loss(q, k, v, ids):
        return jnp.sum(block(q, k, v, ids=ids).astype(jnp.float32))

    traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(q, k, v, ids)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    backward = {"cudnn": 0, "splash": 2}[impl]  # cuDNN's backward kernel has a name of its own
    forward = len(re.findall(rf"custom_call @{target}", text)) - backward
    assert forward == (1 if names else 2)
