"""Learning rates by hand, the decay mask, AdamW and Muon, rounded moments, a chain of one's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from refusal import refused
from tiny_model import tiny_model, tiny_optim

from llamajax import optim
from llamajax.checkpoint import named_leaves
from llamajax.config.schema import OptimConfig
from llamajax.models.llama import Llama
from llamajax.optim.moments import round_stochastically

RATES = {"learning_rate": 1e-2, "final_learning_rate": 1e-3}
CONFIG = tiny_optim(
    **RATES, warmup_steps=10, schedule="cosine", decay_steps=20, weight_decay=0.0, clip_norm=None
)
STEPS = 110
# The rate at the updates 91, 100, and 110; wsd decays from 90 on.
LATER = {
    "cosine": [1e-3 + 4.5e-3 * (1 + np.cos(part * np.pi)) for part in (0.81, 0.9, 1)],
    "linear": (2.71e-3, 1.9e-3, 1e-3),
    "wsd": (9.55e-3, 5.5e-3, 1e-3),
    "constant": (1e-2, 1e-2, 1e-2),
}


def tree(scale: float = 1.0) -> dict[str, nnx.Param]:
    """A matrix, a stack of matrices, a vector and a stack of vectors."""
    shapes = {"DF": (3, 4), "FD": (2, 4, 3), "D": (3,)}
    weights = {
        f"w{axes}": nnx.Param(jnp.full(shape, scale, jnp.float32), axes=axes)
        for axes, shape in shapes.items()
    }
    return weights | {"stacked": nnx.Param(jnp.full((2, 3), scale, jnp.float32), axes="D")}


def updated(config: OptimConfig, weights, grads, *, updates: int = 1):
    optimizer = optim.build(config, steps=STEPS)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(weights)
    for _ in range(updates):
        weights, state = optim.apply(optimizer, grads, state, weights)
    return weights, state


@pytest.mark.parametrize("shape", LATER)
def test_the_schedule_at_its_landmarks(shape):
    rate = optim.schedule(dataclasses.replace(CONFIG, schedule=shape), steps=STEPS)
    found = [float(rate(n)) for n in (0, 1, 5, 10, 91, 100, STEPS)]
    np.testing.assert_allclose(found, [0.0, 1e-3, 5e-3, 1e-2, *LATER[shape]], rtol=1e-5)
    config = dataclasses.replace(CONFIG, schedule=shape, warmup_steps=0)
    assert float(optim.schedule(config, steps=STEPS)(1)) == pytest.approx(1e-2, rel=0.01)


def test_the_schedule_is_float32_of_a_traced_count():
    rate = jax.jit(optim.schedule(CONFIG, steps=STEPS))(jnp.int32(10))
    assert rate.dtype == jnp.float32
    assert float(rate) == pytest.approx(1e-2)


def test_decay_shrinks_matrices_alone_by_the_rate_of_the_update():
    config = dataclasses.replace(CONFIG, weight_decay=0.5)
    weights, _ = updated(config, tree(2.0), tree(0.0))
    for name, weight in weights.items():
        expected = 2.0 if name in ("wD", "stacked") else 2.0 * (1 - 1e-3 * 0.5)
        np.testing.assert_allclose(weight.get_value(), expected, rtol=1e-6)


def test_clipping_is_by_the_norm_of_all_gradients():
    values = sum(w.get_value().size for w in tree().values())
    limit = 0.5 * np.sqrt(values)  # half the norm of a gradient of ones
    config = dataclasses.replace(CONFIG, clip_norm=float(limit), epsilon=1.0)
    weights, _ = updated(config, tree(0.0), tree(1.0))
    for weight in weights.values():
        np.testing.assert_allclose(weight.get_value(), -1e-3 * 0.5 / (0.5 + 1.0), rtol=1e-5)


def test_both_moments_are_rounded_to_bfloat16_and_right_on_average():
    """To the nearest, a second moment of 1 would stay there: 0.1 % is less than bfloat16 has."""
    config = dataclasses.replace(CONFIG, moment_dtype="bfloat16", beta1=0.999, beta2=0.999)
    weights = {"w": nnx.Param(jnp.ones((2, 64, 64)), axes="DF")}
    optimizer = optim.build(config, steps=STEPS)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(weights)
    update = jax.jit(lambda s, n: optim.apply(optimizer, weights, s, weights, step=n)[1])
    for n in range(200):
        state = update(state, jnp.int32(n))
    adam = next(s for s in state if hasattr(s, "mu"))
    for moment in (adam.mu["w"].get_value(), adam.nu["w"].get_value()):
        assert moment.dtype == jnp.bfloat16
        values = np.asarray(moment, np.float64)
        assert values.mean() == pytest.approx(1 - 0.999**200, rel=2e-3)
        assert np.unique(values).size > 4
        assert not np.array_equal(values[0], values[1])  # layers round apart
    again = update(state, jnp.int32(200)), update(state, jnp.int32(200))
    for one, same in zip(*map(jax.tree.leaves, again), strict=True):
        np.testing.assert_array_equal(one, same)


def test_a_number_is_rounded_up_with_the_probability_of_what_is_left_out():
    x = jnp.float32([1 + 2**-9, -3.0, 0.0, jnp.inf, jnp.nan, 3.4e38])[:, None]
    bits = jnp.arange(2**16, dtype=jnp.uint32)[None]
    found = np.asarray(round_stochastically(*jnp.broadcast_arrays(x, bits)), np.float64)
    assert found[0].mean() == 1 + 2**-9
    assert set(found[0]) == {1.0, 1 + 2**-7}
    for row, value in zip(found[1:5], (-3.0, 0.0, np.inf, np.nan), strict=True):
        np.testing.assert_array_equal(row, value)


def test_muon_is_that_of_optax_with_the_dims_of_the_letters():
    """Of matrices and stacks of them; embedding and norms are AdamW's."""
    dims = {"query": ("DKH", (0, (1, 2))), "out": ("NHD", ((0, 1), 2)), "down": ("FD", (1, 2))}
    shapes = {"query": (6, 2, 4), "out": (2, 4, 6), "down": (3, 8, 6)}
    shapes |= {"table": (9, 6), "norm": (6,)}
    rng, letters = np.random.default_rng(0), {"table": "VD", "norm": "D"}
    letters |= {name: axes for name, (axes, _) in dims.items()}

    def drawn():
        return {
            name: nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32), axes=letters[name])
            for name, shape in shapes.items()
        }

    numbers = {n: optax.contrib.MuonDimensionNumbers(*d) for n, (_, d) in dims.items()}
    numbers |= {"table": None, "norm": None}
    config = dataclasses.replace(CONFIG, name="muon", weight_decay=0.5, warmup_steps=0)
    rate = optim.schedule(config, steps=STEPS)
    theirs = optax.contrib.muon(
        lambda count: rate(count + 1), beta=0.95, weight_decay=0.5, adam_b1=0.9, adam_b2=0.95,
        consistent_rms=0.2, muon_weight_dimension_numbers=lambda _: numbers,
    )  # fmt: skip
    weights = drawn()
    plain = {name: w.get_value() for name, w in weights.items()}
    ours, state = optim.build(config, steps=STEPS), None
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state, other = ours.init(weights), theirs.init(plain)
        for _ in range(3):
            grads = drawn()
            weights, state = optim.apply(ours, grads, state, weights)
            given = {name: g.get_value() for name, g in grads.items()}
            updates, other = theirs.update(given, other, plain)
            plain = optax.apply_updates(plain, updates)
    for name in dims:
        found = weights[name].get_value()
        np.testing.assert_allclose(found, plain[name], rtol=0, atol=2e-6, err_msg=name)
    adamw = optim.build(dataclasses.replace(config, name="adamw"), steps=STEPS)
    with jax.numpy_dtype_promotion("standard"):
        first = [optim.apply(o, grads, o.init(weights), weights)[0] for o in (ours, adamw)]
    for name in weights:
        same = np.array_equal(*(w[name].get_value() for w in first))
        assert same == (name not in dims), name


def test_muon_has_its_own_rate_where_one_is_set():
    weights = {"w": nnx.Param(jnp.eye(4), axes="DF"), "norm": nnx.Param(jnp.ones(4), axes="D")}
    changes, names = [], []
    for own in (None, 3 * CONFIG.learning_rate):
        config = dataclasses.replace(CONFIG, name="muon", muon_learning_rate=own)
        after, state = updated(config, weights, weights)
        names.append(list(named_leaves(state)))
        changes.append([np.asarray(after[n].get_value() - weights[n].get_value()) for n in weights])
    np.testing.assert_allclose(changes[1][0], 3 * changes[0][0], rtol=1e-3)
    np.testing.assert_array_equal(changes[1][1], changes[0][1])
    assert names[0] == names[1]  # a run that goes on may set it, or clear it
    # 0.2 x sqrt(4) x orthogonal, at a tenth of the rate: Newton-Schulz ends between 0.7 and 1.2
    assert 0.7 < np.abs(np.diag(changes[0][0])).mean() / (1e-3 * 0.4) < 1.2


def test_a_chain_of_the_users_own_is_checked(tmp_path, monkeypatch):
    file = tmp_path / "chains.py"
    file.write_text(CHAINS)
    monkeypatch.syspath_prepend(tmp_path)
    model = jax.eval_shape(lambda key: Llama(tiny_model(), key), jax.random.key(0))

    def built(name: str):
        config = dataclasses.replace(CONFIG, chain=name)
        optimizer = optim.build(config, steps=STEPS)
        optim.check_state(config, optimizer, lambda: model)
        return config

    weights, state = updated(built("chains:lion"), tree(), tree())
    assert isinstance(state[1], optax.ScaleByScheduleState)
    np.testing.assert_allclose(weights["wDF"].get_value(), 1 - 1e-3, rtol=1e-6)
    for name, words in {
        "chains": "is not module:function",
        "no_such_module:f": "Python finds no module no_such_module",
        "chains:nothing": "chains.py defines no function nothing",
        "chains:number": "the function returned int",
        "chains:optax": "chains.py defines no function optax",
        "chains:alone": "too many positional arguments; it must be a function of",
        "itertools:count": "fails: itertools: TypeError",
        "chains:raises": "chains.py, line 16: KeyError: momentum",
        "chains:raises_later": "line 19: ZeroDivisionError",
        "chains:rows": "moments are split over devices by the dims of their weights",
        "chains:whole": "every device would hold all of it",
        "chains:growing": "changes the shapes or dtypes of its state",
        "chains:dividing": f"fails in an update: {file}, line 33: ZeroDivisionError",
        "chains:unlike": f"fails in an update: {file}: ",
    }.items():
        with refused(f"optim.chain = {name}", words):
            built(name)


CHAINS = """
import jax
import jax.numpy as jnp
import optax

def lion(config, rate):
    return optax.chain(optax.scale_by_lion(), optax.scale_by_learning_rate(rate))

def number(config, rate):
    return 3

def alone(config):
    return optax.identity()

def raises(config, rate):
    return {}["momentum"]

def raises_later(config, rate):
    return optax.GradientTransformation(lambda weights: 1 / 0, None)

def rows(config, rate):
    init = lambda weights: jax.tree.map(lambda w: w[..., 0], weights)
    return optax.GradientTransformation(init, lambda g, s, w=None: (g, s))

def whole(config, rate):
    return optax.GradientTransformation(lambda w: jnp.zeros(5000), lambda g, s, w=None: (g, s))

def growing(config, rate):
    init = lambda weights: jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
    return optax.GradientTransformation(init, lambda g, s, w=None: (g, g))

def dividing(config, rate):
    return optax.stateless(lambda g, w: 1 / 0)

def unlike(config, rate):
    return optax.stateless(lambda g, w: [])
"""
