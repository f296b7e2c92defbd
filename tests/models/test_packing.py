"""Nothing flows from the future or from a neighbouring document, through the whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax.config.schema import ModelConfig
from llamajax.models.llama import Compute, Llama

CONFIG = ModelConfig(
    vocab_size=128,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    init_std=0.5,
    max_seq_len=32,
)
T = 12
# Every token of the row differs, so that the gradient of an embedding row is that of one position.
TOKENS = np.arange(T, dtype=np.int32)[None] + 1
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [3] * 3], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]], np.int32)


def influence(impl: str, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Largest absolute derivative (T, S) of the last hidden state at t by the token at s."""
    compute = Compute(dtype=jnp.dtype("float32"), remat="full", attention=impl, loss_chunk_tokens=8)
    model = Llama(CONFIG, jax.random.key(0))
    device_batch = jax.tree.map(jnp.asarray, batch)
    # A direction in which no two components are equal: the norm kills the sum of all.
    direction = jnp.arange(1.0, CONFIG.hidden_size + 1, dtype=jnp.float32)

    def outputs(weights: Llama) -> jax.Array:
        return weights.hidden_states(device_batch, compute)[0] @ direction

    gradients = jax.jit(jax.jacrev(outputs))(model).embedding[...]  # (T, V, D)
    return np.abs(np.asarray(gradients)).max(axis=2)[:, TOKENS[0]]


def logits(batch: dict[str, np.ndarray], model: Llama, impl: str) -> np.ndarray:
    compute = Compute(dtype=jnp.dtype("float32"), remat="full", attention=impl, loss_chunk_tokens=8)
    run = jax.jit(lambda weights, b: weights.logits(b, compute))
    return np.asarray(run(model, jax.tree.map(jnp.asarray, batch)))


@pytest.mark.parametrize("impl", ["xla", "blocked"])
def test_a_token_depends_on_its_past_and_on_nothing_later(impl):
    positions = np.arange(T, dtype=np.int32)[None]
    found = influence(impl, {"tokens": TOKENS, "positions": positions})
    past = np.tril(np.ones((T, T), bool))
    assert np.all(found[~past] == 0.0)
    assert np.all(found[past] > 0.0)


@pytest.mark.parametrize("impl", ["xla", "blocked"])
def test_a_token_depends_on_its_own_document_alone(impl):
    batch = {"tokens": TOKENS, "positions": POSITIONS, "segment_ids": SEGMENTS}
    found = influence(impl, batch)
    own = (SEGMENTS.T == SEGMENTS) & np.tril(np.ones((T, T), bool))
    assert np.all(found[~own] == 0.0)
    assert np.all(found[own] > 0.0)


@pytest.mark.parametrize("impl", ["xla", "blocked"])
def test_a_packed_document_gives_the_logits_that_it_gives_alone(impl):
    model = Llama(dataclasses.replace(CONFIG, tie_embeddings=True), jax.random.key(1))
    batch = {"tokens": TOKENS, "positions": POSITIONS, "segment_ids": SEGMENTS}
    packed = logits(batch, model, impl)[0]
    scale = np.abs(packed).max()
    for segment in (1, 2, 3):
        own = SEGMENTS[0] == segment
        alone = {
            "tokens": TOKENS[:, own],
            "positions": np.arange(own.sum(), dtype=np.int32)[None],
            "segment_ids": np.ones((1, own.sum()), np.int32),
        }
        error = np.abs(logits(alone, model, impl)[0] - packed[own]).max()
        assert error <= 1e-5 * scale, segment
    running = logits(batch | {"positions": np.arange(T, dtype=np.int32)[None]}, model, impl)[0]
    # Rotary positions are relative: a document that starts later is the same document.
    assert np.abs(running - packed).max() <= 1e-4 * scale


def test_stretched_positions_change_the_logits():
    model = Llama(CONFIG, jax.random.key(1))
    batch = {"tokens": TOKENS, "positions": POSITIONS, "segment_ids": SEGMENTS}
    stretched = logits(batch | {"positions": 2 * POSITIONS}, model, "xla")
    assert np.abs(stretched - logits(batch, model, "xla")).max() > 1e-3
