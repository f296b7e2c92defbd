"""Small models with weights large enough that greedy text is no repetition of one token."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from meshes import mesh_of
from tiny_model import tiny_model

from llamajax import sharding
from llamajax.config.schema import ModelConfig, RopeScaling
from llamajax.decoding.engine import Engine
from llamajax.decoding.generate_options import Sampling
from llamajax.decoding.prompts import Prompt
from llamajax.models.llama import Llama

GROUPED = tiny_model(hidden_size=24, intermediate_size=52, head_size=6, max_seq_len=96)
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)
CONFIGS = {
    "grouped": GROUPED,
    "tied": dataclasses.replace(GROUPED, tie_embeddings=True),
    "llama3 rope": dataclasses.replace(GROUPED, rope_scaling=LLAMA3, rope_theta=12_345.0),
    "odd sizes": dataclasses.replace(
        GROUPED, hidden_size=33, num_heads=3, num_kv_heads=1, intermediate_size=55, num_layers=1
    ),
}


@pytest.fixture(scope="session")
def configs() -> dict[str, ModelConfig]:
    """Architectures by what is special about them."""
    return CONFIGS


@pytest.fixture(scope="session")
def new_engine():
    """Makes an engine of `GROUPED` on a mesh, with random or given weights."""

    random = jax.jit(lambda key: Llama(GROUPED, key))(jax.random.key(0))

    def make(*, model=None, sizes=None, stop_ids=(), **sampling) -> Engine:
        mesh = mesh_of(**(sizes or {}))
        model = jax.device_put(model or random, sharding.shardings(model or random, mesh))
        return Engine(
            model,
            mesh,
            dtype=jnp.dtype("float32"),
            attention=lambda seq_len: "blocked",
            sampling=Sampling(**({"temperature": 0.0} | sampling)),
            stop_ids=stop_ids,
        )

    return make


@pytest.fixture(scope="session")
def new_tokens():
    """All new tokens of prompts, given as {number: ids}."""

    def run(engine, prompts, *, count=12, seed=0, interval_s=None) -> dict[int, list[int]]:
        rows = [Prompt(number, ids, count) for number, ids in prompts.items()]
        found = {number: [] for number in prompts}
        for update in engine.generate(rows, seed=seed, interval_s=interval_s):
            for number, ids in zip(prompts, update, strict=True):
                found[number] += ids
        return found

    return run
