"""Small Llamas of transformers and of ours, and what the tests of Hugging Face's format share."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamajax import sharding
from llamajax.config.schema import MeshConfig, ModelConfig, RopeScaling
from llamajax.models.llama import Compute, Llama, plain_batch

BASE = ModelConfig(
    vocab_size=131,
    hidden_size=24,
    intermediate_size=44,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=6,
    rope_theta=12_345.0,
    norm_eps=3e-5,
    tie_embeddings=False,
    init_std=0.1,
    max_seq_len=64,
)
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)
COMPUTE = Compute(dtype=jnp.dtype("float32"), remat="none", attention="xla", loss_chunk_tokens=16)


def random_config(seed: int) -> ModelConfig:
    """An architecture that nobody published: every size drawn, tied and scaled at random."""
    draw = np.random.default_rng(seed)
    kv_heads = int(draw.integers(1, 4))
    heads = kv_heads * int(draw.integers(1, 4))
    return dataclasses.replace(
        BASE,
        vocab_size=int(draw.integers(50, 290)),
        hidden_size=heads * int(draw.integers(3, 8)),  # transformers wants a multiple
        intermediate_size=int(draw.integers(9, 70)),
        num_layers=int(draw.integers(1, 4)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=2 * int(draw.integers(1, 8)),
        rope_theta=float(draw.uniform(1e3, 1e6)),
        rope_scaling=LLAMA3 if draw.random() < 0.5 else None,
        tie_embeddings=bool(draw.random() < 0.5),
    )


def random_model(config: ModelConfig, *, seed: int = 0) -> Llama:
    """A model whose norm scales are no ones; padding rows are zero. NumPy's: nothing compiles."""
    shapes = jax.eval_shape(lambda key: Llama(config, key), jax.random.key(0))
    draw = np.random.default_rng(seed)

    def one(weight: Any) -> Any:
        mean = 1.0 if len(weight.axes) == 1 else 0.0
        value = draw.normal(mean, config.init_std, weight.get_value().shape).astype(np.float32)
        if weight.axes[0] == "V":
            value[config.vocab_size :] = 0.0
        return weight.replace(jnp.asarray(value))

    return sharding.map_weights(one, shapes)


def mesh(**axes: int) -> jax.sharding.Mesh:
    config = MeshConfig(**axes)
    count = int(np.prod([getattr(config, axis) for axis in sharding.AXES]))
    return sharding.build_mesh(config, jax.devices()[:count])


def tokens(config: ModelConfig) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, (2, 33))


def logits(model: Llama, ids: np.ndarray) -> np.ndarray:
    batch = jax.tree.map(jnp.asarray, plain_batch(ids))
    return np.asarray(jax.jit(lambda m, b: m.logits(b, COMPUTE))(model, batch))


def assert_same(actual: Any, expected: Any) -> None:
    """Bitwise equality of two models' weights, dtypes included."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        a, b = np.asarray(a), np.asarray(b)
        name = jax.tree_util.keystr(path)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of a config.json; `...` removes one."""
    file = directory / "config.json"
    config = json.loads(file.read_text("utf-8")) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    file.write_text(json.dumps(config), "utf-8")
