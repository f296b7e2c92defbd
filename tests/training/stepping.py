"""A few training steps of a small packed model on any mesh, with NumPy's weights; for tests."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from meshes import mesh_of
from tiny_model import COMPUTE as PLAIN_COMPUTE
from tiny_model import named_arrays, tiny_model, tiny_optim

from llamajax import optim, sharding
from llamajax.config.schema import TrainConfig
from llamajax.models.layer_order import pipeline_order
from llamajax.models.pipeline import PipelineOptions
from llamajax.training.state import StateSpec, TrainState
from llamajax.training.step import train_step

MODEL = tiny_model(num_heads=16, num_kv_heads=8, init_std=0.2)
# An epsilon far above the gradients makes Adam's updates proportional to them: with a small one
# the update of a gradient that is nearly zero would be its sign, and rounding would show.
OPTIM = tiny_optim(epsilon=0.1)
TRAIN = TrainConfig(steps=10, seed=0, dtype="float32")
COMPUTE = dataclasses.replace(PLAIN_COMPUTE, remat="full")
B, T, STEPS = 16, 16, 2
# Half the time of these tests; what is compared is the partitioned program, not LLVM's work on it.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def packed_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Two documents a row and padding, with very unequal numbers of targets in the rows."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, MODEL.vocab_size, (B, T + 1)).astype(np.int32)
    border = rng.integers(1, T, (B, 1))
    after, at = np.arange(T) >= border, np.arange(T)
    used = at < np.where(np.arange(B) < 5, 1, T)[:, None]  # one token in the first five rows
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.where(after, at - border, at).astype(np.int32),
        "segment_ids": np.where(used, 1 + after, 0).astype(np.int32),
        "loss_mask": used & (at != border - 1),
    }


def drawn_state(spec: StateSpec) -> TrainState:
    """A state whose weights NumPy draws: a program that does takes longer to compile than a step.

    That `StateSpec.init` gives every mesh the same weights is in `test_init.py`.
    """
    sizes, abstract = spec.model, spec.in_stored_order.abstract()
    rng = np.random.default_rng(3)

    def draw(leaf):
        rows = leaf.shape[0] == sizes.padded_vocab_size
        value = rng.normal(0.0 if rows or leaf.ndim > 2 else 1.0, sizes.init_std, leaf.shape)
        if rows:
            value[sizes.vocab_size :] = 0
        return value.astype(leaf.dtype)

    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    model, adapters = jax.tree.map(draw, (abstract.model, abstract.adapters))
    state = zeros.replace(model=model, adapters=adapters)
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    return spec.to_pipeline_order(state)


@functools.cache
def run(
    *axes,
    accumulation=1,
    steps=STEPS,
    fast=True,
    rounds=1,
    layers=2,
    tied=False,
    offload=False,
    lora=None,
    optimizer=(),
    **options,
):
    """Metrics of each step, the weights and adapters after the last by name, the number of traces.

    `axes` are pairs of a mesh axis and its size, `optimizer` those of a key and its value.
    """
    mesh = mesh_of(**dict(axes))
    model = dataclasses.replace(MODEL, tie_embeddings=tied, num_layers=layers)
    given = {
        name: options.pop(name) for name in ("microbatch_size", "remat_stage") & options.keys()
    }
    pipeline = PipelineOptions(rounds=rounds, **given)
    train = dataclasses.replace(
        TRAIN, accumulation_steps=accumulation, pipeline_rounds=rounds,
        microbatch_size=pipeline.microbatch_size,
    )  # fmt: skip
    sharding.check_divides(model.dims, mesh, batch=B, seq_len=T, train=train)
    config = dataclasses.replace(OPTIM, offload=offload, **dict(optimizer))
    order = pipeline_order(layers, stages=mesh.shape["stage"], rounds=rounds)
    optimizer = optim.build(config, steps=TRAIN.steps, facts=optim.RunFacts(layers=order))
    spec = StateSpec(
        model=model, optimizer=optimizer, mesh=mesh, rounds=rounds, offload=offload, lora=lora
    )
    state = drawn_state(spec)
    split = {"split_tokens": mesh.shape["tensor"] > 1}
    if mesh.shape["sequence"] > 1:
        split["attention"] = "split"
    compute = dataclasses.replace(COMPUTE, **{"pipeline": pipeline, **split, **options})
    step = jitted = train_step(optimizer, config, train, compute, mesh)
    batches, rows = [sharding.put_batch(packed_batch(n), mesh) for n in range(steps)], []
    if fast:
        step = jitted.lower(state, batches[0]).compile(compiler_options=FAST_COMPILE)
    for batch in batches:
        state, metrics = step(state, batch)
        rows.append({name: value.item() for name, value in metrics.items()})
    stored = spec.to_stored_order(state)
    weights = named_arrays(stored.model) | named_arrays(stored.adapters)
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    return rows, weights, jitted._cache_size()


def assert_same(found, expected, *, rtol=1e-5):
    for row, wanted in zip(found[0], expected[0], strict=True):
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, rel=rtol), name
    for name, value in expected[1].items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(found[1][name], value, rtol=0, atol=rtol * scale, err_msg=name)
