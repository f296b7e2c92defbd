"""The model against transformers: logits, loss, gradients, and fifty updates against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stored
from llama_cases import STEPS, TRAINED, UPDATES, tokens, weights
from plain_batch import plain_batch

from llamajax import optim, sharding
from llamajax.checkpoint import rebuild
from llamajax.config.schema import MeshConfig, TrainConfig
from llamajax.formats.huggingface.hf_names import ROWS, to_ours
from llamajax.formats.huggingface.hf_read import named_weights
from llamajax.models.llama import Compute, Llama
from llamajax.training.state import TrainState
from llamajax.training.step import train_step

TOLERANCE = 1e-5  # largest difference over largest value: float32, sums in another order
LOSS_TOLERANCE = 1e-4  # relative, after fifty updates that feed on each other
COMPUTE = Compute(dtype=jnp.dtype("float32"), remat="full", attention="xla", loss_chunk_tokens=16)


def as_ours(model: Llama, theirs: dict[str, np.ndarray]) -> Llama:
    """A copy of `model` with the arrays that stand under transformers' names in `theirs`."""

    filled = {}
    for name, weight in named_weights(model).items():
        row, dims = ROWS[name], sharding.letters(weight)
        array = np.zeros(weight.get_value().shape, np.float32)
        for layer, part in enumerate(array if dims[0] == "L" else array[None]):
            stored = theirs[row.theirs.format(layer)]
            value = to_ours(stored, row, dims.removeprefix("L"), model.config)
            part[: len(value)] = value  # zeros below it pad the vocabulary
        filled[name] = jnp.asarray(array)
    return rebuild(model, filled)


def assert_close(actual, expected, name=""):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, name
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"{name}: {error:.2e}"


@pytest.mark.parametrize("name", TRAINED)
def test_logits_loss_and_gradients_equal_transformers(name):
    config = TRAINED[name]
    reference, ids = stored.arrays("trained"), tokens(config, (2, 33))
    model = as_ours(Llama(config, jax.random.key(0)), weights(config))
    batch = jax.tree.map(jnp.asarray, plain_batch(ids))

    @jax.jit
    def run(weights):
        objective = lambda w: w.loss_terms(batch, COMPUTE).objective / ids[:, 1:].size  # noqa: E731
        return weights.logits(batch, COMPUTE), *jax.value_and_grad(objective)(weights)

    logits, loss, grads = run(model)
    assert_close(logits, reference[f"{name}/logits"], "logits")
    assert_close(loss, reference[f"{name}/loss"], "loss")
    gradients = {key: reference[f"{name}/gradients/{key}"] for key in weights(config)}
    expected = as_ours(model, gradients)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True
    ):
        assert_close(got, want, jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["grouped", "tied"])
def test_fifty_updates_follow_pytorch(name):
    config, o = TRAINED[name], UPDATES
    t = TrainConfig(steps=STEPS, seed=0, dtype="float32")
    mesh = sharding.build_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = optim.build(o, steps=STEPS)
    model = as_ours(Llama(config, jax.random.key(0)), weights(config))
    with jax.numpy_dtype_promotion("standard"):
        state = TrainState(step=jnp.int32(0), model=model, opt_state=optimizer.init(model))
    state = jax.device_put(state, sharding.shardings(state, mesh))
    step, ours = train_step(optimizer, o, t, COMPUTE, mesh), []
    for ids in tokens(config, (STEPS, 2, 33)):
        state, metrics = step(state, sharding.put_batch(plain_batch(ids), mesh))
        ours.append((metrics["loss"].item(), metrics["grad_norm"].item()))
    theirs = stored.arrays("trained")[f"{name}/updates"]
    np.testing.assert_allclose(ours, theirs, rtol=LOSS_TOLERANCE)
    assert theirs[:, 1].max() > o.clip_norm, "clipping is part of this"
