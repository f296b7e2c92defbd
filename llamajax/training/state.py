"""The state of a run: what a step takes and returns, and all that a checkpoint must hold."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from llamajax.config.schema import LoraConfig, ModelConfig
from llamajax.models.abstract import abstract_model
from llamajax.models.llama import Llama
from llamajax.models.lora import Adapters, attach, init_adapters
from llamajax.models.order import arranged, is_natural, natural
from llamajax.sharding import shardings


@struct.dataclass
class TrainState:
    """Step n means n updates applied."""

    step: jax.Array  # int32 scalar
    model: Llama  # float32 master weights; frozen where there are adapters
    opt_state: optax.OptState  # of what is trained
    adapters: Adapters | None = None

    @property
    def trained(self) -> Any:
        """The weights that updates change."""
        return self.model if self.adapters is None else self.adapters

    @property
    def whole(self) -> Llama:
        """The model that computes: with its adapters beside the weights that they adapt."""
        return attach(self.model, self.adapters)

    @property
    def to_save(self) -> "TrainState":
        """What a checkpoint holds: frozen weights are read again from where they came from."""
        return self if self.adapters is None else self.replace(model=None)

    def updated(self, trained: Any, opt_state: optax.OptState) -> "TrainState":
        """The state after one more update."""
        name = "model" if self.adapters is None else "adapters"
        return self.replace(step=self.step + 1, opt_state=opt_state, **{name: trained})


def _around(
    model: Llama, optimizer: optax.GradientTransformation, lora: LoraConfig | None, key: jax.Array
) -> TrainState:
    adapters = init_adapters(model.config, lora, key) if lora else None
    state = TrainState(step=jnp.int32(0), model=model, opt_state=(), adapters=adapters)
    with jax.numpy_dtype_promotion("standard"):
        return state.replace(opt_state=optimizer.init(state.trained))


def _placed(shapes: Any, mesh: Mesh) -> Any:
    one = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(one, shapes, shardings(shapes, mesh))


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    lora: LoraConfig | None = None,
    rounds: int | None = 1,
) -> TrainState:
    """Shapes, dtypes and shardings of the whole state; nothing is allocated.

    With `lora`, adapters train and the model is frozen in `lora.base_dtype`. Layers are stored as a
    pipeline of so many rounds wants them; with none in their natural order, as they are on disk.
    """
    model = abstract_model(config, mesh, dtype=jnp.dtype(lora.base_dtype if lora else "float32"))

    def whole(model: Llama, key: jax.Array) -> TrainState:
        state = _around(model, optimizer, lora, key)
        return state if rounds is None else _piped(state, config, mesh, rounds)

    return _placed(jax.eval_shape(whole, model, jax.random.key(0)), mesh)


def _piped(tree: Any, config: ModelConfig, mesh: Mesh, rounds: int) -> Any:
    """Stacks in natural order -> in the order of the mesh's pipeline."""
    if is_natural(config.num_layers, stages=mesh.shape["stage"], rounds=rounds):
        return tree
    return arranged(tree, mesh, rounds=rounds)


def to_pipeline(tree: Any, config: ModelConfig, mesh: Mesh, *, rounds: int) -> Any:
    """A state (or part of one) in natural order -> in the order of the mesh's pipeline."""
    return _rearranged(tree, config, mesh, rounds, lambda t: _piped(t, config, mesh, rounds))


def to_natural(tree: Any, config: ModelConfig, mesh: Mesh, *, rounds: int) -> Any:
    """The reverse. Both give back what they got where the pipeline stores layers in their order."""
    back = lambda t: natural(t, config.num_layers, mesh, rounds=rounds)  # noqa: E731
    return _rearranged(tree, config, mesh, rounds, back)


def _rearranged(tree: Any, config: ModelConfig, mesh: Mesh, rounds: int, function: Any) -> Any:
    if is_natural(config.num_layers, stages=mesh.shape["stage"], rounds=rounds):
        return tree
    placed = shardings(jax.eval_shape(function, tree), mesh)
    return jax.jit(function, out_shardings=placed)(tree)


def init_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    rounds: int = 1,
) -> TrainState:
    """Random initial state, born sharded. The same seed gives the same weights on every mesh."""
    abstract = abstract_state(config, optimizer, mesh, rounds=rounds)
    placed = jax.tree.map(lambda x: x.sharding, abstract)

    def fresh(key: jax.Array) -> TrainState:
        state = _around(Llama(config, key), optimizer, None, key)
        return _piped(state, config, mesh, rounds)

    init: Any = jax.jit(fresh, out_shardings=placed)
    return init(jax.random.key(seed))


def state_around(
    model: Llama,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    lora: LoraConfig | None,
    seed: int,
) -> TrainState:
    """State of step 0 around given weights, which are taken over and not copied.

    Layers are in their natural order, as in `model`.
    """
    abstract = abstract_state(model.config, optimizer, mesh, lora=lora, rounds=None)
    rest = abstract.replace(model=None)
    placed = jax.tree.map(lambda x: x.sharding, rest)

    def make(key: jax.Array) -> TrainState:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract.model)
        return _around(zeros, optimizer, lora, key).replace(model=None)

    return jax.jit(make, out_shardings=placed)(jax.random.key(seed)).replace(model=model)
