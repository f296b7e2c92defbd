"""Attention over the cache against full attention, and what a row may see of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import COMPUTE, tiny_model

from llamajax.config.model_schema import RopeScaling
from llamajax.decoding import kv_cache as kv
from llamajax.decoding.decode_steps import Rows, append_token, fill_cache
from llamajax.models.llama import Llama

YARN = RopeScaling(type="yarn", factor=8.0, original_max_seq_len=16, attention_factor=1.5)
CONFIGS = {
    "grouped": {},
    "tied": {"tie_embeddings": True},
    "yarn": {"rope_scaling": YARN, "rope_theta": 12_345.0},
    "odd sizes": {
        "hidden_size": 33, "num_heads": 3, "num_kv_heads": 1, "head_size": 6,
        "intermediate_size": 55, "num_layers": 1,
    },
}  # fmt: skip
TOLERANCE = 1e-5  # largest difference over largest value: float32, sums in another order


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_prefill_and_decode_give_the_logits_of_a_full_forward_at_every_position(changes):
    config, length, prompt_slots, slots = tiny_model(**changes), 24, 16, 32
    model = jax.jit(lambda key: Llama(config, key))(jax.random.key(1))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (4, length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    batch = {"tokens": jnp.asarray(ids), "positions": jnp.asarray(positions)}
    expected = np.asarray(jax.jit(lambda m: m.logits(batch, COMPUTE))(model))
    scale = np.abs(expected).max()
    lengths = np.array([1, 16, 9, 3], np.int32)
    padding = np.arange(prompt_slots)[None] >= lengths[:, None]
    prompts = np.where(padding, 5, ids[:, :prompt_slots])  # any token may pad
    fill = jax.jit(lambda m, t, n: fill_cache(m, t, n, COMPUTE, slots=slots))
    append = jax.jit(lambda m, rows: append_token(m, rows, COMPUTE))
    cache, logits = fill(model, prompts, lengths)
    np.testing.assert_allclose(
        logits / scale, expected[np.arange(4), lengths - 1] / scale, rtol=0, atol=TOLERANCE
    )
    for n in range(length - lengths.max()):
        rows = Rows(
            cache=cache,
            lengths_B=jnp.asarray(lengths),
            numbers_B=jnp.arange(4, dtype=jnp.int32),
            tokens_B=jnp.asarray(ids[np.arange(4), lengths + n]),
            running_B=jnp.ones(4, bool),
            seen_BV=None,
            count=jnp.int32(n + 1),
            prompt_slots=jnp.int32(prompt_slots),
        )
        cache, logits = append(model, rows)
        np.testing.assert_allclose(
            logits / scale, expected[np.arange(4), lengths + n] / scale, rtol=0, atol=TOLERANCE
        )


def test_buckets_are_powers_of_two_up_to_the_context():
    assert [kv.bucket(n) for n in (1, 2, 3, 4, 5, 1000)] == [1, 2, 4, 4, 8, 1024]
    assert [kv.prompt_slots(n, max_seq_len=6000) for n in (1, 16, 17, 5000)] == [16, 16, 32, 6016]
    assert [kv.bucket(n, least=16) for n in (1, 128, 129)] == [16, 128, 256]
