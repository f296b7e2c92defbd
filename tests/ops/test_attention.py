"""Attention against float64 NumPy, in value and gradient, alone and inside the sharded scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llamajax.errors import UserError
from llamajax.ops import attention_blocked, attention_kernels, references
from llamajax.ops.attention import SUPPORTED, attention, check_supported, choose_attention
from llamajax.ops.comparison import TOLERANCES, errors

PLAIN = ("xla", "blocked")
SHAPE = (2, 70, 6, 2, 24)  # B, T, N, K, H: T fits no block, heads are odd per group
DOCUMENTS = np.array([[1] * 3 + [2] * 40 + [3] * 20 + [0] * 7, [1] * 69 + [2]], np.int32)


def inputs(shape=SHAPE, seed=0):
    B, T, N, K, H = shape
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((B, T, n, H)), jnp.float32) for n in (N, K, K))


def value_and_grads(impl, q, k, v, ids, weights):
    def weighted(q, k, v):
        o = attention(q, k, v, impl=impl, segment_ids_BT=ids)
        return jnp.sum(o.astype(jnp.float32) * weights), o

    grads, o = jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(q, k, v)
    return o, *grads


def assert_right(function, shape, ids, dtype):
    """Value and gradients by q, k and v are those of float64 NumPy."""
    arrays = [np.asarray(x) for x in inputs(shape, seed=1)]
    reference = functools.partial(references.attention, segment_ids_BT=ids)
    found = errors(function, reference, arrays, dtype=dtype, device=jax.devices()[0])
    assert np.max(found) <= TOLERANCES[dtype], found
    operands = [jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays]
    assert jax.eval_shape(function, *operands).dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("impl", PLAIN)
def test_value_and_gradients_are_those_of_float64_numpy(impl, packed, dtype):
    ids = DOCUMENTS if packed else np.ones_like(DOCUMENTS)
    segment_ids = jnp.asarray(ids) if packed else None
    attend = functools.partial(attention, impl=impl, segment_ids_BT=segment_ids)
    assert_right(attend, SHAPE, ids, dtype)


@pytest.mark.parametrize(
    ("seq_len", "packed"),
    [(3, False), (64, False), (129, True), (1100, True)],  # 1100: larger blocks
)
def test_blocks_of_every_size_are_those_of_float64_numpy(seq_len, packed):
    rng = np.random.default_rng(4)
    ids = np.sort(rng.integers(1, 5 if packed else 2, (1, seq_len)), axis=1).astype(np.int32)
    segment_ids = jnp.asarray(ids) if packed else None
    attend = functools.partial(attention, impl="blocked", segment_ids_BT=segment_ids)
    assert_right(attend, (1, seq_len, 2, 1, 8), ids, "float32")


@pytest.mark.parametrize("impl", PLAIN)
def test_no_gradient_from_the_future_or_another_document(impl):
    q, k, v = inputs()
    row, query = 0, 50  # the third document begins at 43
    weights = jnp.zeros(q.shape).at[row, query].set(1.0)
    _, dq, dk, dv = value_and_grads(impl, q, k, v, jnp.asarray(DOCUMENTS), weights)
    for grad in (dk, dv):
        touched = np.asarray(jnp.any(grad != 0, axis=(2, 3)))
        assert not touched[1].any()
        assert set(np.flatnonzero(touched[row])) == set(range(43, 51))
    assert set(zip(*np.nonzero(np.asarray(jnp.any(dq != 0, (2, 3)))), strict=True)) == {
        (row, query)
    }


@pytest.mark.parametrize("impl", PLAIN)
def test_padding_is_finite_and_reaches_nobody(impl):
    q, k, v = inputs()
    is_padding = DOCUMENTS == 0
    weights = jnp.asarray(~is_padding, jnp.float32)[:, :, None, None] * jnp.ones(q.shape)
    values = value_and_grads(impl, q, k, v, jnp.asarray(DOCUMENTS), weights)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in values)
    for grad in values[1:]:
        assert not np.asarray(grad)[is_padding].any()
        assert np.asarray(grad)[~is_padding].any()


def assert_sharded_equals(function, mesh, arrays, specs, *, check_vma=True, atol=1e-5):
    """Value and gradients by q, k, v of `function`, whose output is sharded as q."""
    run = functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=specs[0])
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]

    def grads(f, arrays):
        run = jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1, 2))
        return jax.tree.leaves(jax.jit(run)(*arrays))

    found = grads(run(function, check_vma=check_vma), placed)
    for a, b in zip(found, grads(function, arrays), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("impl", PLAIN)
def test_sharded_in_a_rematerialized_scan_equals_unsharded(impl, check_vma):
    q, k, v = inputs((4, 70, 4, 2, 8), seed=5)
    ids = jnp.asarray(np.tile(DOCUMENTS, (2, 1)))
    policy = jax.checkpoint_policies.save_only_these_names("attention")

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def block(q, scale, k, v, ids):
        return q + scale * attention(q, k, v, impl=impl, segment_ids_BT=ids)

    def layers(q, k, v, ids):
        scales = jnp.arange(1.0, 4.0)
        return jax.lax.scan(lambda q, s: (block(q, s, k, v, ids), None), q, scales)[0]

    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    heads = P("data", None, "tensor")
    specs = (heads, heads, heads, P("data"))
    assert_sharded_equals(layers, mesh, (q, k, v, ids), specs, check_vma=check_vma)


@pytest.mark.parametrize("impl", PLAIN)
def test_keys_that_are_equal_on_several_devices_get_the_sum_of_their_gradients(impl):
    """Four query heads over two devices share one kv head, which each of them holds."""
    q, k, v = inputs((1, 70, 4, 1, 8), seed=6)
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    plain = functools.partial(attention, impl=impl, segment_ids_BT=None)
    assert_sharded_equals(plain, mesh, (q, k, v), (P(None, None, "tensor"), P(), P()), atol=1e-6)


def count(jaxpr, name):
    """How often a primitive stands in a program, inner programs included."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name == name
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program):
            if _is_program(value):
                total += count(getattr(value, "jaxpr", value), name)
    return total


def _is_program(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


@pytest.mark.parametrize("names", [("attention",), ()], ids=["saved", "recomputed"])
def test_a_saved_attention_is_not_computed_again(names):
    """One block: 2 products forward, 5 backward; another 2 where the tags are not saved."""
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    block = functools.partial(attention, impl="blocked", segment_ids_BT=jnp.asarray(DOCUMENTS))
    starts = len(attention_blocked.block_starts(SHAPE[1]))

    def loss(*qkv):
        return jnp.sum(jax.checkpoint(block, policy=policy)(*qkv) ** 2)

    program = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*inputs()).jaxpr
    assert count(program, "dot_general") == starts * (7 if names else 9)


def test_blocks_are_few_and_cover_the_sequence():
    for seq_len in (1, 63, 64, 65, 512, 1024, 1025, 4096, 8191, 131072):
        starts = attention_blocked.block_starts(seq_len)
        assert len(starts) <= 16
        assert starts[-1] < seq_len <= starts[-1] + starts.step


def test_splash_interpreted_equals_numpy():
    ids = np.repeat([[1, 2, 0]], [100, 130, 26], axis=1)
    kernel = attention_kernels.splash_attention
    attend = functools.partial(kernel, segment_ids_BT=jnp.asarray(ids, jnp.int32), interpret=True)
    assert_right(attend, (1, 256, 2, 1, 128), ids, "float32")


def test_what_cannot_run_says_why():
    facts = {"platform": "cuda", "dtype": "bfloat16", "head_size": 128, "seq_len": 4096}
    assert check_supported("cudnn", **facts) == []
    assert check_supported("cudnn", **facts, compute_capability="9.0") == []
    assert "8.0" in check_supported("cudnn", **facts, compute_capability="8.0")[0]
    assert "float32" in check_supported("cudnn", **(facts | {"dtype": "float32"}))[0]
    assert "132" in check_supported("cudnn", **(facts | {"head_size": 132}))[0]
    assert "platform tpu" in check_supported("splash", **facts)[0]
    tpu = facts | {"platform": "tpu"}
    assert check_supported("splash", **tpu) == []
    assert "4000" in check_supported("splash", **(tpu | {"seq_len": 4000}))[0]
    assert "'flash'" in check_supported("flash", **facts)[0]
    for impl in PLAIN:
        assert impl in SUPPORTED
        assert check_supported(impl, **(facts | {"platform": "npu", "head_size": 13})) == []


def test_auto_takes_the_first_that_fits_or_names_every_reason():
    facts = {"dtype": "bfloat16", "head_size": 128, "seq_len": 4096}
    order = ("cudnn", "splash", "blocked")
    chosen = [
        choose_attention("auto", order, platform=p, **facts).impl for p in ("cuda", "tpu", "cpu")
    ]
    assert chosen == ["cudnn", "splash", "blocked"]
    with pytest.raises(UserError, match=r"(?s)platform cuda.*platform tpu"):
        choose_attention("auto", ("cudnn", "splash"), platform="npu", **facts)
