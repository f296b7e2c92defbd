"""cuDNN attention without a GPU: the offsets it is given, and the path around its limit.

The kernel is replaced by one that reads documents as cuDNN documents it: from element offsets and
lengths alone, never from segment ids.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stepping

from llamajax.backends.jax_private import cudnn
from llamajax.ops import attention as attention_module
from llamajax.ops import attention_kernels, references
from llamajax.ops.attention import attention, check_supported
from llamajax.ops.comparison import TOLERANCES, errors


def test_documents_become_lengths_and_offsets_in_elements():
    ids = jnp.asarray([[1, 1, 2, 0], [1, 2, 2, 2]], jnp.int32)
    docs = cudnn.documents(ids, max_documents=3)
    np.testing.assert_array_equal(docs.lengths, [[2, 1, 1], [1, 3, 0]])
    q, k = (jnp.zeros((2, 4, heads, 10), jnp.bfloat16) for heads in (10, 1))
    _, q_lengths, kv_lengths, q_offsets, kv_offsets, *_ = cudnn._operands(q, k, docs)
    assert q_lengths is docs.lengths is kv_lengths
    np.testing.assert_array_equal(q_offsets, [[0, 200, 300, 400], [500, 800, 800, 800]])
    np.testing.assert_array_equal(kv_offsets, [[0, 20, 30, 40], [50, 80, 80, 80]])


def test_a_document_does_not_continue_into_the_next_row():
    ids = jnp.ones((3, 4), jnp.int32)
    docs = cudnn.documents(ids, max_documents=2)
    np.testing.assert_array_equal(docs.lengths.reshape(-1)[:4], [4, 4, 4, 0])


def places(offsets, lengths, like):
    """Which document place owns each token, from what cuDNN is told."""
    shape_BT = like.shape[:2]
    starts = offsets.reshape(-1)[: lengths.size] // (like.shape[2] * like.shape[3])
    token = jnp.arange(shape_BT[0] * shape_BT[1])[:, None]
    owned = (token >= starts[None]) & (token < (starts + lengths.reshape(-1))[None])
    return jnp.argmax(owned, axis=1).reshape(shape_BT), jnp.sum(owned, axis=1)


class ImitationKernel:
    """`cudnn.forward` and `cudnn.backward` in plain JAX."""

    @staticmethod
    def plain(q, k, v, docs):
        T, H = q.shape[1], q.shape[3]
        _, q_lengths, kv_lengths, q_offsets, kv_offsets, *_ = cudnn._operands(q, k, docs)
        own_q, owners = places(q_offsets, q_lengths, q)
        own_kv, _ = places(kv_offsets, kv_lengths, k)
        allowed = own_q[:, :, None] == own_kv[:, None, :]
        allowed = allowed & (jnp.arange(T)[:, None] >= jnp.arange(T)[None])[None]
        s = (
            jnp.einsum(
                "btkgh,bskh->bkgts", q.reshape(-1, T, k.shape[2], q.shape[2] // k.shape[2], H), k
            )
            * H**-0.5
        )
        p = jax.nn.softmax(jnp.where(allowed[:, None, None], s, -jnp.inf), axis=-1)
        o = jnp.einsum("bkgts,bskh->btkgh", p, v).reshape(q.shape)
        return jnp.where(jnp.all(owners == 1), o, jnp.nan)

    @staticmethod
    def forward(q, k, v, docs):
        _, T, N, _ = q.shape
        statistics = jnp.full((docs.lengths.size, N, T), 7.0)
        return ImitationKernel.plain(q, k, v, docs), statistics

    @staticmethod
    def backward(q, k, v, docs, statistics, o, do):
        grads = jax.vjp(lambda *qkv: ImitationKernel.plain(*qkv, docs), q, k, v)[1](do)
        return tuple(jnp.where(jnp.all(statistics == 7.0), g, jnp.nan) for g in grads)


@pytest.fixture
def imitated(monkeypatch):
    """cuDNN's kernel is the imitation."""
    monkeypatch.setattr(cudnn, "forward", ImitationKernel.forward)
    monkeypatch.setattr(cudnn, "backward", ImitationKernel.backward)


def test_grouped_queries_over_packed_documents_are_those_of_float64_numpy(imitated):
    B, T, N, K, H = 2, 70, 6, 2, 8
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((B, T, heads, H)) for heads in (N, K, K)]
    ids = np.sort(rng.integers(0, 3, (B, T)), axis=1)[:, ::-1].astype(np.int32)
    attend = functools.partial(attention, impl="cudnn", segment_ids_BT=jnp.asarray(ids))
    reference = functools.partial(references.attention, segment_ids_BT=ids)
    found = errors(attend, reference, arrays, dtype="float32", device=jax.devices()[0])
    assert np.max(found) <= TOLERANCES["float32"], found


@pytest.mark.parametrize(
    ("room", "unused"), [(3, "split"), (1, None)], ids=["kernel", "too-many-documents"]
)
def test_a_step_decides_once_whether_the_kernel_has_room(imitated, monkeypatch, room, unused):
    """Rows of up to 3 documents. The kernel gives NaN where one is lost."""
    monkeypatch.setattr(attention_kernels, "max_documents", lambda _: room)
    if unused:
        nan = jnp.float32(jnp.nan)
        monkeypatch.setitem(attention_module._IMPLEMENTATIONS, unused, lambda q, *_: q * nan)
    mesh, options = (("fsdp", 2), ("tensor", 2), ("data", 2)), {"accumulation": 4, "steps": 1}
    found = stepping.run.__wrapped__(*mesh, attention="cudnn", **options)
    assert [row["split_attention"] for row in found[0]] == [room < 3]
    stepping.assert_same(found, stepping.run(*mesh, **options))


def test_room_is_counted_for_the_rows_of_one_call():
    room = attention_kernels.max_documents(64)
    counts = jnp.asarray([1, 2 * room - 1, room + 1, room - 1])
    ids = jnp.minimum(jnp.arange(64)[None], counts[:, None] - 1)
    assert bool(attention_kernels.kernel_has_room(ids, rows=2))
    assert not bool(attention_kernels.kernel_has_room(ids, rows=1))


@pytest.mark.parametrize("head_size", [8, 136, 256, 260, 264])
def test_head_sizes_are_those_that_jax_allows_from_hopper_on(monkeypatch, head_size):
    """By JAX's own check; then the program for a GPU calls the kernel, forward and backward."""
    from jax._src.cudnn import fused_attention_stablehlo as module

    facts = {"platform": "gpu", "dtype": "bfloat16", "seq_len": 128, "compute_capability": "9.0"}
    problems = check_supported("cudnn", **facts, head_size=head_size)
    x = jnp.zeros((1, 128, 2, head_size), jnp.bfloat16)
    monkeypatch.setattr(module, "check_compute_capability", lambda _: True)
    asked = (x, x, x, module.AttentionLayout.BTNH.value, 91000, False, True, True)
    if problems:
        with pytest.raises(NotImplementedError, match="head dim must be <= 256"):
            module.check_is_flash_attention(*asked)
        return
    module.check_is_flash_attention(*asked)

    def summed(q, k, v, ids):
        return jnp.sum(attention(q, k, v, impl="cudnn", segment_ids_BT=ids).astype(jnp.float32))

    traced = jax.jit(jax.grad(summed, (0, 1, 2))).trace(x, x, x, jnp.ones((1, 128), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("fmhaSoftmax", "fmhaSoftmaxBackward"):
        assert text.count(f"@__cudnn${kernel}(") == 1


def lowering_rule(taken):
    """A CUDA lowering rule of a made-up release, with these parameters."""
    namespace: dict = {}
    exec(f"def rule({', '.join(taken)}): ...", namespace)
    return namespace["rule"]


def with_rule(monkeypatch, direction, *, added=(), without=()):
    from jax._src.cudnn import fused_attention_stablehlo as module

    taken = [name for name in ("ctx", *cudnn._EXPECTED[direction], *added) if name not in without]
    name = f"_dot_product_attention_{direction}_cuda_lowering"
    monkeypatch.setattr(module, name, lowering_rule(taken))
    monkeypatch.setattr(jax, "__version__", "9.9.9")


@pytest.mark.parametrize("added", [(), ("score_mod_name", "score_mod_jaxpr")])
def test_an_unknown_release_with_the_known_parameters_is_accepted(monkeypatch, added):
    with_rule(monkeypatch, "fwd", added=added)
    assert cudnn.problem() is None
    _, parameters = cudnn._bound(jnp.zeros((1, 8, 1, 8)), None)
    assert [name for name in parameters if name.startswith("score_mod")] == list(added)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize(
    "change",
    [{"added": ("paged",)}, {"without": ("seed",)}, {"without": ("q_offsets",)}],
    ids=["new", "gone", "operand-gone"],
)
def test_other_parameters_are_refused_by_name_with_the_fix(monkeypatch, direction, change):
    with_rule(monkeypatch, direction, **change)
    (name,) = next(iter(change.values()))
    problem = cudnn.problem()
    assert f"jax 9.9.9 is not as in the releases that were tested (parameters of {direction}: " in (
        problem
    )
    assert f": {name})" in problem
    assert "--config.train.attention=blocked" in problem
    facts = {"platform": "gpu", "dtype": "bfloat16", "seq_len": 128, "head_size": 64}
    assert check_supported("cudnn", **facts) == [problem]
