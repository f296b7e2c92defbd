"""Small Llamas of transformers with random weights, and our logits for what they were stored as."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from llamajax import sharding
from llamajax.checkpoint.weights import open_weights
from llamajax.config.schema import MeshConfig, ModelConfig, RopeScaling
from llamajax.models.abstract import abstract_model
from llamajax.models.llama import Compute, Llama

torch.set_num_threads(1)  # its threads would wait for those of XLA

TOLERANCE = 1e-5  # largest difference over largest value: float32, sums in another order
GROUPED = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    rope_theta=12_345.0,
    norm_eps=3e-5,
    tie_embeddings=False,
    init_std=0.02,
    max_seq_len=64,
)
LLAMA31 = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
)
TIED = dataclasses.replace(GROUPED, tie_embeddings=True)
SCALED = dataclasses.replace(
    GROUPED, rope_theta=500_000.0, rope_scaling=LLAMA31, max_seq_len=131_072
)


def torch_llama(c: ModelConfig) -> transformers.LlamaForCausalLM:
    """transformers' Llama of that architecture, with random weights, norms included."""
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling is not None:
        names = ("factor", "low_freq_factor", "high_freq_factor")
        rope |= {name: getattr(c.rope_scaling, name) for name in names}
        rope["rope_type"] = "llama3"
        rope["original_max_position_embeddings"] = c.rope_scaling.original_max_seq_len
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_size,
        rope_parameters=rope,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings,
        max_position_embeddings=c.max_seq_len,
        attn_implementation="eager",
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.1).add_(1.0 if "norm" in name else 0.0)
    return model


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k as Meta orders them: both partners of a rotary pair side by side."""
    heads = weight.reshape(num_heads, 2, -1, weight.shape[-1])
    return torch.stack([heads[:, 0], heads[:, 1]], dim=2).reshape(weight.shape)


def torch_logits(model: transformers.LlamaForCausalLM, ids: np.ndarray) -> np.ndarray:
    """Logits (B, T, V) of transformers."""
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def load(path: Path, config: MeshConfig) -> Llama:
    """The model that `path` holds, on a mesh."""
    weights = open_weights(path)
    mesh = sharding.build_mesh(config, jax.devices()[: config.fsdp * config.tensor])
    return weights.load(abstract_model(weights.model, mesh))


def our_logits(model: Llama, ids: np.ndarray) -> np.ndarray:
    """Logits (B, T, V) of our model, wherever its weights are."""
    compute = Compute(
        dtype=jnp.dtype("float32"), remat="none", attention="xla", loss_chunk_tokens=16
    )
    whole = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), model)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    batch = {"tokens": jnp.asarray(ids, jnp.int32), "positions": jnp.asarray(positions)}
    return np.asarray(jax.jit(lambda m, b: m.logits(b, compute))(whole, batch))


def tokens(c: ModelConfig) -> np.ndarray:
    """Random tokens (2, 20)."""
    return np.random.default_rng(0).integers(0, c.vocab_size, (2, 20))


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal shapes, and equal values to TOLERANCE of the largest."""
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"{error:.2e}"
