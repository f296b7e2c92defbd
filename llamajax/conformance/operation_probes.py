"""Probes of the operations of a Llama step: llamajax's own, at odd sizes, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llamajax import optim
from llamajax.config.model_schema import RopeScaling
from llamajax.config.schema import OptimConfig
from llamajax.conformance.bench import Bench, WrongError, compare
from llamajax.ops import attention as attentions
from llamajax.ops import cross_entropy as losses
from llamajax.ops import embedding as embeddings
from llamajax.ops import norm, references
from llamajax.ops import rope as rotary
from llamajax.ops.linear import linear

_EPS, _THETA = 3e-5, 12_345.0
_BETAS, _ADAM_EPS, _RATE, _DECAY = (0.85, 0.93), 1e-6, 0.01, 0.2
_ADAM_TOLERANCE = 2e-6  # of the largest weight; seen on a CPU: 1e-7


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape)


def _integers(seed: int, below: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, below, shape).astype(np.int32)


def embedding(bench: Bench) -> str:
    """Look up tokens that occur several times: their gradients add up."""
    tokens_BT = _integers(1, 11, 3, 17)

    def function(table):
        return embeddings.embed(
            table.astype(jnp.float32), jnp.asarray(tokens_BT), table.dtype, False
        )

    reference = functools.partial(references.embedding, tokens_BT=tokens_BT)
    return compare(bench, function, reference, [_normal(2, 37, 13)])


def rms_norm(bench: Bench) -> str:
    """Normalize a row of very small values among others, where the epsilon counts."""
    x_BTD = _normal(1, 2, 5, 27)
    x_BTD[0, 0] *= 1e-2
    function = functools.partial(norm.rms_norm, eps=_EPS)
    reference = functools.partial(references.rms_norm, eps=_EPS)
    return compare(bench, function, reference, [x_BTD, 1 + 0.1 * _normal(2, 27)])


def rope(bench: Bench) -> str:
    """Rotate with yarn's scaling at positions up to 4,000, where cosines want good reduction."""
    positions_BT = _integers(1, 4000, 2, 9)
    scaling = RopeScaling(type="yarn", factor=4.0, original_max_seq_len=1000)
    frequency = rotary.frequencies(10, theta=_THETA, scaling=scaling)
    factor = rotary.attention_factor(scaling)

    def function(x):
        return rotary.rotate(x, rotary.angles(jnp.asarray(positions_BT), frequency, factor))

    reference = functools.partial(
        references.rope, positions_BT=positions_BT, frequency=frequency, factor=factor
    )
    return compare(bench, function, reference, [_normal(2, 2, 9, 3, 10)])


def feed_forward(bench: Bench) -> str:
    """Compute SwiGLU with an odd width."""

    def function(x, gate, up, down):
        return linear(jax.nn.silu(linear(x, gate)) * linear(x, up), down)

    weights = [0.3 * _normal(n, *shape) for n, shape in enumerate([(13, 29)] * 2 + [(29, 13)])]
    return compare(bench, function, references.feed_forward, [_normal(5, 2, 7, 13), *weights])


def attention(bench: Bench) -> str:
    """Attend plainly: 33 tokens in two documents and padding, 6 query heads on 3."""
    return _attention(bench, "xla", tokens=33, heads=(6, 3), head_size=10)


def attention_kernel(bench: Bench) -> str:
    """Attend with the kernel that a run would choose here, at a size that kernels take."""
    texts = []
    for dtype in ("bfloat16", "float32"):
        impl = attentions.best_attention(bench.machine, dtype, 64, 256).impl
        text = _attention(bench, impl, tokens=256, heads=(4, 2), head_size=64, dtypes=(dtype,))
        texts.append(f"{impl}: {text}")
    return "; ".join(texts)


def _attention(
    bench: Bench,
    impl: str,
    *,
    tokens: int,
    heads: tuple[int, int],
    head_size: int,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
) -> str:
    ids_BT = np.ones((2, tokens), np.int32)
    ids_BT[0, tokens // 3 :] = 2
    ids_BT[1, tokens - 5 :] = 3
    shapes = [(2, tokens, n, head_size) for n in (heads[0], heads[1], heads[1])]
    return compare(
        bench,
        functools.partial(attentions.attention, impl=impl, segment_ids_BT=jnp.asarray(ids_BT)),
        functools.partial(references.attention, segment_ids_BT=ids_BT),
        [_normal(n, *shape) for n, shape in enumerate(shapes)],
        dtypes=dtypes,
    )


def cross_entropy(bench: Bench) -> str:
    """Sum the loss in chunks that do not divide the tokens, with targets that do not count."""
    targets_BT, mask_BT = _integers(1, 41, 2, 17), np.random.RandomState(2).rand(2, 17) < 0.7

    def function(x, head):
        terms = losses.cross_entropy(
            x,
            head.astype(jnp.float32),
            jnp.asarray(targets_BT),
            jnp.asarray(mask_BT),
            vocab_size=41,
            chunk_tokens=10,
            z_weight=0.0,
        )
        return terms.objective

    reference = functools.partial(references.cross_entropy, targets_BT=targets_BT, mask_BT=mask_BT)
    return compare(bench, function, reference, [_normal(3, 2, 17, 13), _normal(4, 41, 13)])


def scan(bench: Bench) -> str:
    """Scan a recurrence whose body is recomputed in the backward pass."""

    def body(state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jnp.tanh(0.9 * state + x) + 0.1 * jnp.flip(state)
        return state, state

    def function(x: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.scan(jax.checkpoint(body), start, x)[1]

    arrays = [_normal(1, 7, 5), _normal(2, 5)]
    # float32 alone: a recurrence makes its own roundings larger from step to step
    return compare(bench, function, references.scan, arrays, dtypes=("float32",))


def indexing(bench: Bench) -> str:
    """Scatter with repeated rows, slice at a computed place, roll and choose."""
    rows_N = np.array([4, 0, 4, 7, 4], np.int32)

    def function(x: jax.Array, y: jax.Array) -> jax.Array:
        rows = jnp.asarray(rows_N)
        out = x.at[rows].add(y)
        part = jax.lax.dynamic_slice_in_dim(y, jnp.sum(rows) - 18, 2, axis=0)
        out = jax.lax.dynamic_update_slice_in_dim(out, part * 2, jnp.max(rows) - 5, axis=0)
        out = jnp.roll(out, -3, axis=0)
        return jnp.where(out < 0, out / 2, out)

    reference = functools.partial(references.indexing, rows_N=rows_N, start=2)
    return compare(bench, function, reference, [_normal(1, 9, 3), _normal(2, 5, 3)])


def adamw(bench: Bench) -> str:
    """Apply three updates by llamajax's own chain."""
    config = OptimConfig(
        learning_rate=_RATE,
        warmup_steps=0,
        schedule="constant",
        final_learning_rate=_RATE,
        beta1=_BETAS[0],
        beta2=_BETAS[1],
        epsilon=_ADAM_EPS,
        weight_decay=_DECAY,
        clip_norm=None,
    )
    optimizer = optim.build(config, steps=3)
    start, *grads = (_normal(n, 13, 7).astype(np.float32) for n in range(4))

    def tree(x: np.ndarray) -> dict[str, nnx.Param]:
        return {"w": nnx.Param(bench.put(x), axes="DF")}

    weights = tree(start)
    state = optimizer.init(weights)
    update = jax.jit(lambda grads, state, w: optim.apply(optimizer, grads, state, w))
    for grad in grads:
        weights, state = update(tree(grad), state, weights)
    wide = [x.astype(np.float64) for x in (start, *grads)]
    expected = references.adamw(
        wide[0], wide[1:], rate=_RATE, betas=_BETAS, eps=_ADAM_EPS, decay=_DECAY
    )
    found = np.asarray(weights["w"][...])
    error = np.max(np.abs(found - expected)) / np.max(np.abs(expected))
    if not error <= _ADAM_TOLERANCE:
        raise WrongError(f"error {error:.1e} of the largest weight; {_ADAM_TOLERANCE:.0e} allowed")
    return f"error {error:.1e} of the largest weight after 3 updates"


def sampling(bench: Bench) -> str:
    """Sort, sum cumulatively and take the first of the largest, as generation does."""
    x_BV = _integers(1, 19, 3, 47).astype(np.float32)

    @jax.jit
    def chosen(x: jax.Array) -> tuple[jax.Array, ...]:
        falling = jnp.sort(x, axis=1, descending=True)
        return falling, jnp.cumsum(falling, axis=1), jnp.argmax(x, axis=1).astype(jnp.int32)

    falling = -np.sort(-x_BV, axis=1)
    expected = [falling, np.cumsum(falling, axis=1), np.argmax(x_BV, axis=1)]
    found = [np.asarray(y) for y in chosen(bench.put(x_BV))]
    for name, a, b in zip(("sort", "cumsum", "argmax"), found, expected, strict=True):
        if not np.array_equal(a, b):
            raise WrongError(f"{name} of (3, 47) values is wrong in {np.sum(a != b)} places")
    return "sort, cumsum and argmax exact"
