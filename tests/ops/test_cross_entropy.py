"""Value and gradient of the chunked cross-entropy against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax.ops.cross_entropy import cross_entropy

B, T, D, ROWS = 3, 7, 6, 16
TOLERANCE = 1e-5  # largest difference over largest value: float32 against float64


def inputs(vocab: int):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    head = 3 * rng.normal(size=(ROWS, D)).astype(np.float32)
    return x, head, rng.integers(0, vocab, (B, T)).astype(np.int32), rng.random((B, T)) < 0.6


def reference(x, head, targets, mask, *, vocab: int, z_weight: float):
    """(nll, z, gradient by x, gradient by the head) of the sum, in float64."""
    x, head = x.reshape(-1, D).astype(np.float64), head.astype(np.float64)
    mask, targets = mask.reshape(-1).astype(np.float64), targets.reshape(-1)
    odds = np.exp(x @ head[:vocab].T)
    partition = odds.sum(axis=1)
    log_partition = np.log(partition)
    nll = (log_partition - np.sum(x * head[targets], axis=1)) @ mask
    grad = odds / partition[:, None] * (1 + 2 * z_weight * log_partition)[:, None]
    grad = (grad - np.eye(vocab)[targets]) * mask[:, None]
    grad_head = np.zeros_like(head)
    grad_head[:vocab] = grad.T @ x
    return nll, log_partition**2 @ mask, (grad @ head[:vocab]).reshape(B, T, D), grad_head


@pytest.mark.parametrize("vocab", [ROWS, 11])
@pytest.mark.parametrize(("chunk", "z_weight"), [(4, 0.0), (7, 0.3), (512, 0.3)])
def test_value_and_gradient_equal_float64(vocab, chunk, z_weight):
    x, head, targets, mask = inputs(vocab)

    def objective(x, head):
        options = {"vocab_size": vocab, "chunk_tokens": chunk, "z_weight": z_weight}
        terms = cross_entropy(x, head, jnp.asarray(targets), jnp.asarray(mask), **options)
        return terms.objective, terms

    run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (value, terms), grads = run(jnp.asarray(x), jnp.asarray(head))
    nll, z, *expected = reference(x, head, targets, mask, vocab=vocab, z_weight=z_weight)
    np.testing.assert_allclose(terms.nll, nll, rtol=TOLERANCE)
    np.testing.assert_allclose(terms.z, z, rtol=TOLERANCE)
    np.testing.assert_allclose(value, nll + z_weight * z, rtol=TOLERANCE)
    for got, want in zip(grads, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())
    assert not np.asarray(grads[1])[vocab:].any(), "padding has no gradient"
    assert not np.asarray(grads[0])[~mask].any(), "nor have tokens that do not count"
