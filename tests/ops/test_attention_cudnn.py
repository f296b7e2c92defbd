"""cuDNN attention without a GPU: the offsets it is given, and the path around its limit.

The kernel is replaced by one that reads documents as cuDNN documents it: from element offsets and
lengths alone, never from segment ids.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax.backends import cudnn
from llamajax.errors import UserError
from llamajax.ops import attention_kernels
from llamajax.ops.attention import attention


def test_documents_become_lengths_and_offsets_in_elements():
    ids = jnp.asarray([[1, 1, 2, 0], [1, 2, 2, 2]], jnp.int32)
    docs, fits = cudnn.documents(ids, max_documents=3, q_stride=100, kv_stride=10)
    assert bool(fits)
    np.testing.assert_array_equal(docs.lengths, [[2, 1, 1], [1, 3, 0]])
    np.testing.assert_array_equal(docs.q_offsets, [[0, 200, 300, 400], [500, 800, 800, 800]])
    np.testing.assert_array_equal(docs.kv_offsets, [[0, 20, 30, 40], [50, 80, 80, 80]])
    _, fits = cudnn.documents(ids, max_documents=2, q_stride=1, kv_stride=1)
    assert not bool(fits)


def test_a_document_does_not_continue_into_the_next_row():
    ids = jnp.ones((3, 4), jnp.int32)
    docs, _ = cudnn.documents(ids, max_documents=2, q_stride=1, kv_stride=1)
    np.testing.assert_array_equal(docs.lengths.reshape(-1)[:4], [4, 4, 4, 0])


def places(offsets, lengths, stride, shape_BT):
    """Which document place owns each token, from what cuDNN is told."""
    starts = offsets.reshape(-1)[: lengths.size] // stride
    token = jnp.arange(shape_BT[0] * shape_BT[1])[:, None]
    owned = (token >= starts[None]) & (token < (starts + lengths.reshape(-1))[None])
    return jnp.argmax(owned, axis=1).reshape(shape_BT), jnp.sum(owned, axis=1)


class ImitationKernel:
    """`cudnn.forward` and `cudnn.backward` in plain JAX."""

    @staticmethod
    def plain(q, k, v, docs):
        B, T, N, H = q.shape
        own_q, owners = places(docs.q_offsets, docs.lengths, N * H, (B, T))
        own_kv, _ = places(docs.kv_offsets, docs.lengths, k.shape[2] * H, (B, T))
        allowed = own_q[:, :, None] == own_kv[:, None, :]
        allowed = allowed & (jnp.arange(T)[:, None] >= jnp.arange(T)[None])[None]
        s = jnp.einsum("btkgh,bskh->bkgts", q.reshape(B, T, k.shape[2], -1, H), k) * H**-0.5
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


@pytest.mark.parametrize("num_documents", [3, 40], ids=["kernel", "too-many-documents"])
def test_grouped_queries_over_packed_documents_equal_xla(monkeypatch, num_documents):
    monkeypatch.setattr(cudnn, "forward", ImitationKernel.forward)
    monkeypatch.setattr(cudnn, "backward", ImitationKernel.backward)
    B, T, N, K, H = 2, 70, 6, 2, 8
    rng = np.random.default_rng(0)
    q, k, v, weights = (
        jnp.asarray(rng.standard_normal((B, T, n, H)), jnp.float32) for n in (N, K, K, N)
    )
    ids = jnp.asarray(np.sort(rng.integers(0, num_documents, (B, T)), axis=1)[:, ::-1], jnp.int32)
    room = B * attention_kernels.max_documents(T)
    used = int(jnp.sum(ids[:, 1:] != ids[:, :-1])) + B
    assert (used <= room) == (num_documents == 3)

    def weighted(q, k, v, impl):
        o = attention(q, k, v, impl=impl, segment_ids_BT=ids)
        return jnp.sum(o * weights), o

    (got, got_o), (want, want_o) = (
        jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True), static_argnums=3)(q, k, v, impl)
        for impl in ("cudnn", "xla")
    )
    for a, b in zip((got_o, *got), (want_o, *want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", ["0.10.2", "0.12.0.1", "0.12.0"])
def test_releases_that_were_read_are_accepted(version):
    assert cudnn.version_problems(version) == []


@pytest.mark.parametrize("version", ["0.9.9", "0.11.0", "0.12.1", "0.13.0.dev20270101", "1.0"])
def test_unknown_releases_of_jax_are_refused_with_the_fix(version):
    (problem,) = cudnn.version_problems(version)
    assert version in problem
    assert "--config.train.attention=blocked" in problem


def test_binding_on_an_unknown_release_is_a_user_error(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "9.9.9")
    q = jnp.zeros((1, 8, 1, 8), jnp.bfloat16)
    with pytest.raises(UserError, match=r"9\.9\.9"):
        cudnn.forward(q, q, q, None)
