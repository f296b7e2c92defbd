"""Llamas small enough to compile in a second, and optimizers for them."""

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.config.schema import ModelConfig, OptimConfig
from llamajax.models.llama import Compute, Llama

COMPUTE = Compute(dtype=jnp.dtype("float32"), remat="none", attention="xla", loss_chunk_tokens=20)


def tiny_model(**changes) -> ModelConfig:
    """A config of two layers with grouped queries, and these fields changed."""
    fields = {
        "vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_size": 4, "rope_theta": 10_000.0,
        "norm_eps": 1e-5, "tie_embeddings": False, "init_std": 0.3, "max_seq_len": 64,
    }  # fmt: skip
    return ModelConfig(**(fields | changes))


def tiny_optim(**changes) -> OptimConfig:
    """AdamW at a constant rate without warm-up, and these fields changed."""
    fields = {
        "learning_rate": 0.1, "warmup_steps": 0, "schedule": "constant",
        "final_learning_rate": 0.1, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8,
        "weight_decay": 0.1, "clip_norm": 1.0,
    }  # fmt: skip
    return OptimConfig(**(fields | changes))


def draw_like(shapes, seed: int, *, std: float):
    """Arrays of these shapes from NumPy: compiling JAX's own random numbers takes seconds."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(std * rng.normal(size=x.shape), x.dtype), shapes)


def draw_llama(config: ModelConfig, seed: int = 0, *, std: float = 0.3) -> Llama:
    """A model with normal weights, norm scales included."""
    shapes = jax.eval_shape(lambda key: Llama(config, key), jax.random.key(0))
    return draw_like(shapes, seed, std=std)


def named_arrays(tree) -> dict[str, np.ndarray]:
    """The leaves of a tree as NumPy arrays, by the path to each."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
