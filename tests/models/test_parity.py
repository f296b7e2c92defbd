"""The model against transformers: logits, loss, gradients, and fifty updates against PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax import optim, sharding
from llamajax.checkpoint import rebuild
from llamajax.checkpoint.hf_names import ROWS, to_ours
from llamajax.checkpoint.hf_read import named_weights
from llamajax.config.schema import MeshConfig, ModelConfig, OptimConfig, RopeScaling, TrainConfig
from llamajax.models.llama import Compute, Llama, plain_batch
from llamajax.training.state import TrainState
from llamajax.training.step import train_step

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # its threads would wait for those of XLA

TOLERANCE = 1e-5  # largest difference over largest value: float32, sums in another order
LOSS_TOLERANCE = 1e-4  # relative, after fifty updates that feed on each other
STEPS = 50

GROUPED = ModelConfig(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=52,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=6,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    init_std=0.1,
    max_seq_len=64,
)
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)
CONFIGS = {
    "grouped": GROUPED,
    "tied": dataclasses.replace(GROUPED, tie_embeddings=True),
    "llama3 rope": dataclasses.replace(GROUPED, rope_scaling=LLAMA3, rope_theta=12_345.0),
    "wide heads": dataclasses.replace(GROUPED, head_size=14, num_kv_heads=4, norm_eps=1e-3),
    "odd sizes": dataclasses.replace(
        GROUPED, hidden_size=33, num_heads=3, num_kv_heads=1, intermediate_size=55, num_layers=1
    ),
    "whole rows of 128": dataclasses.replace(GROUPED, vocab_size=128),
}
COMPUTE = Compute(dtype=jnp.dtype("float32"), remat="full", attention="xla", loss_chunk_tokens=16)


def torch_model(c: ModelConfig):
    """transformers' Llama of that architecture, with random weights, norms included."""
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling is not None:
        names = ("factor", "low_freq_factor", "high_freq_factor")
        rope |= {name: getattr(c.rope_scaling, name) for name in names}
        rope |= {
            "rope_type": "llama3",
            "original_max_position_embeddings": c.rope_scaling.original_max_seq_len,
        }
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
    model = transformers.LlamaForCausalLM(config).float().train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.1).add_(1.0 if "norm" in name else 0.0)
    return model


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


def arrays(model, *, grads: bool = False) -> dict[str, np.ndarray]:
    named = model.named_parameters()
    return {k: (w.grad if grads else w).detach().numpy().copy() for k, w in named}


def tokens(c: ModelConfig, *, count: int = 1) -> np.ndarray:
    found = np.random.default_rng(0).integers(0, c.vocab_size, (count, 2, 33))
    return found if count > 1 else found[0]


def torch_loss(model, ids: np.ndarray):
    logits = model(torch.tensor(ids[:, :-1])).logits
    targets = torch.tensor(ids[:, 1:]).reshape(-1)
    return logits, torch.nn.functional.cross_entropy(logits.reshape(len(targets), -1), targets)


def assert_close(actual, expected, name=""):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, name
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"{name}: {error:.2e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients_equal_transformers(name):
    config = CONFIGS[name]
    reference, ids = torch_model(config), tokens(config)
    expected_logits, expected_loss = torch_loss(reference, ids)
    expected_loss.backward()
    model = as_ours(Llama(config, jax.random.key(0)), arrays(reference))
    batch = jax.tree.map(jnp.asarray, plain_batch(ids))

    @jax.jit
    def run(weights):
        objective = lambda w: w.loss_terms(batch, COMPUTE).objective / ids[:, 1:].size  # noqa: E731
        return weights.logits(batch, COMPUTE), *jax.value_and_grad(objective)(weights)

    logits, loss, grads = run(model)
    assert_close(logits, expected_logits.detach().numpy(), "logits")
    assert_close(loss, expected_loss.item(), "loss")
    expected = as_ours(model, arrays(reference, grads=True))
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True
    ):
        assert_close(got, want, jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["grouped", "tied"])
def test_fifty_updates_follow_pytorch(name):
    config = CONFIGS[name]
    reference, batches = torch_model(config), tokens(config, count=STEPS)
    o = OptimConfig(
        learning_rate=3e-3,
        warmup_steps=5,
        schedule="cosine",
        final_learning_rate=3e-4,
        beta1=0.9,
        beta2=0.95,
        epsilon=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    t = TrainConfig(steps=STEPS, seed=0, dtype="float32")
    mesh = sharding.build_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = optim.build(o, steps=STEPS)
    model = as_ours(Llama(config, jax.random.key(0)), arrays(reference))
    with jax.numpy_dtype_promotion("standard"):
        state = TrainState(step=jnp.int32(0), model=model, opt_state=optimizer.init(model))
    state = jax.device_put(state, sharding.shardings(state, mesh))
    step, ours = train_step(optimizer, o, t, COMPUTE, mesh), []
    rate = optim.schedule(o, steps=STEPS)
    groups = {True: [], False: []}
    for weight in reference.parameters():
        groups[weight.ndim > 1].append(weight)
    adamw = torch.optim.AdamW(
        [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}],
        betas=(o.beta1, o.beta2),
        eps=o.epsilon,
        weight_decay=o.weight_decay,
    )
    theirs = []
    for n, ids in enumerate(batches, start=1):
        state, metrics = step(state, sharding.place(plain_batch(ids), mesh))
        ours.append((metrics["loss"].item(), metrics["grad_norm"].item()))
        adamw.zero_grad()
        _, loss = torch_loss(reference, ids)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), o.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = float(rate(n))
        adamw.step()
        theirs.append((loss.item(), norm.item()))
    np.testing.assert_allclose(ours, theirs, rtol=LOSS_TOLERANCE)
    assert max(norm for _, norm in theirs) > o.clip_norm, "clipping is part of this"
