"""The model against transformers: logits, loss, gradients, and fifty updates against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stored
from llama_cases import STEPS, TRAINED, UPDATES, tokens, weights
from llamas import assert_close
from meshes import mesh_of
from plain_batch import plain_batch
from stepping import COMPUTE
from tiny_model import named_arrays

from llamajax import optim, sharding
from llamajax.checkpoint import rebuild
from llamajax.config.schema import TrainConfig
from llamajax.formats.huggingface.hf_names import ROWS, to_ours
from llamajax.formats.huggingface.hf_read import named_weights
from llamajax.models.llama import Llama
from llamajax.training.state import TrainState
from llamajax.training.step import train_step

LOSS_TOLERANCE = 1e-4  # relative, after fifty updates that feed on each other


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
    found, expected = named_arrays(grads), named_arrays(as_ours(model, gradients))
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        assert_close(found[key], want, key)


@pytest.mark.parametrize("name", ["grouped", "tied"])
def test_fifty_updates_follow_pytorch(name):
    config, o = TRAINED[name], UPDATES
    t = TrainConfig(steps=STEPS, seed=0, dtype="float32")
    mesh, optimizer = mesh_of(), optim.build(o, steps=STEPS)
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
