"""Small Llamas of ours, and what the tests of weights in files share."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from llama_cases import GROUPED
from meshes import mesh_of
from plain_batch import plain_batch
from tiny_model import COMPUTE

from llamajax import sharding
from llamajax.config.schema import ModelConfig
from llamajax.formats.foreign_weights import Export
from llamajax.formats.huggingface.hf_write import write_hf
from llamajax.formats.llama_sources import ModelSource
from llamajax.formats.weights import open_weights
from llamajax.models.abstract import abstract_model
from llamajax.models.llama import Llama

TOLERANCE = 1e-5  # largest difference over largest value: float32, sums in another order
BASE = dataclasses.replace(
    GROUPED, vocab_size=131, intermediate_size=44, num_layers=2, rope_theta=12_345.0, norm_eps=3e-5
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


def export_hf(
    model: Llama, config: ModelConfig, path: Path, dtype: str = "float32", **more: Any
) -> list[str]:
    """Write a model in memory as a Hugging Face directory; return warnings."""
    source, tokenizer = ModelSource(model, config), more.pop("tokenizer", None)
    export = Export(source=source, model=config, tokenizer=tokenizer)
    return write_hf(export, path, dtype=dtype, **more)


def load(path: Path, **axes: int) -> Llama:
    """The model that `path` holds, on a mesh."""
    weights = open_weights(path)
    return weights.load(abstract_model(weights.model, mesh_of(**axes)))


def logits(model: Llama, ids: np.ndarray) -> np.ndarray:
    """Logits (B, T, V) of our model, wherever its weights are."""
    whole = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), model)
    batch = plain_batch(np.pad(ids, ((0, 0), (0, 1))))  # the last is no input
    return np.asarray(jax.jit(lambda m, b: m.logits(b, COMPUTE))(whole, batch))


def assert_close(actual: np.ndarray, expected: np.ndarray, name: str = "") -> None:
    """Equal shapes, and equal values to TOLERANCE of the largest."""
    assert actual.shape == expected.shape, name
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"{name}: {error:.2e}"


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of a config.json; `...` removes one."""
    file = directory / "config.json"
    config = json.loads(file.read_text("utf-8")) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    file.write_text(json.dumps(config), "utf-8")
