"""The state of a run: what a step takes and returns, and all that a checkpoint must hold."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from llamajax.backends.platforms import exact_options
from llamajax.config.schema import LoraConfig, ModelConfig
from llamajax.models.abstract import abstract_model
from llamajax.models.layer_order import is_stored_order, to_pipeline_order, to_stored_order
from llamajax.models.llama import Llama
from llamajax.models.lora import Adapters, attach, init_adapters
from llamajax.optim.guard import GuardState, new_guard
from llamajax.sharding import shardings


@struct.dataclass
class TrainState:
    """Step n means n global batches read, each with one update unless a guard left it out.

    So a step is the same place in the data and in the schedule whatever was left out.
    """

    step: jax.Array  # int32 scalar
    model: Llama  # float32 master weights; frozen where there are adapters
    opt_state: optax.OptState  # of what is trained
    adapters: Adapters | None = None
    guard: GuardState | None = None  # none: every update is applied

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

    def updated(
        self, trained: Any, opt_state: optax.OptState, guard: GuardState | None
    ) -> "TrainState":
        """The state after one more step."""
        name = "model" if self.adapters is None else "adapters"
        parts = {name: trained, "opt_state": opt_state, "guard": guard}
        return self.replace(step=self.step + 1, **parts)


def _around(
    model: Llama,
    optimizer: optax.GradientTransformation,
    lora: LoraConfig | None,
    layout: "Layout",
    key: jax.Array,
) -> TrainState:
    adapters = init_adapters(model.config, lora, key) if lora else None
    guard = None if layout.guard_window is None else new_guard(layout.guard_window)
    state = TrainState(step=jnp.int32(0), model=model, opt_state=(), adapters=adapters, guard=guard)
    with jax.numpy_dtype_promotion("standard"):
        return state.replace(opt_state=optimizer.init(state.trained))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a state is stored on its mesh; changes no value.

    rounds: layers stand as a pipeline of so many rounds wants them; none: in their natural order,
    as they do on disk. offload: the moments rest in pinned host memory. guard_window: updates that
    the guard remembers; none: there is no guard.
    """

    rounds: int | None = 1
    offload: bool = False
    guard_window: int | None = None

    @property
    def at_rest(self) -> "Layout":
        """The same with layers in their natural order."""
        return dataclasses.replace(self, rounds=None)


def with_stored_guard(state: TrainState, stored: Mapping[str, jax.ShapeDtypeStruct]) -> TrainState:
    """An abstract state with the guard that a checkpoint holds, by the names of its arrays.

    That may be none (of a run without, or older than guards), or one with another window.
    """
    names = {field.name: f"guard/{field.name}" for field in dataclasses.fields(GuardState)}
    if not all(name in stored for name in names.values()):
        return state.replace(guard=None)
    one = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=state.step.sharding)  # noqa: E731
    return state.replace(guard=GuardState(**{f: one(stored[n]) for f, n in names.items()}))


def with_own_guard(state: TrainState, layout: Layout) -> TrainState:
    """A restored state with a guard as the layout wants it; a new window begins empty."""
    window, found = layout.guard_window, state.guard
    if window is None or (found is not None and found.loss_W.shape == (window,)):
        return state if window is not None else state.replace(guard=None)
    make: Any = jax.jit(new_guard, static_argnums=0, out_shardings=state.step.sharding)
    fresh = make(window)
    return state.replace(guard=fresh if found is None else fresh.replace(skipped=found.skipped))


def fetched(opt_state: optax.OptState) -> optax.OptState:
    """Moments in the memory of the device, to compute with; inside `jax.jit`."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), opt_state)


def stowed(opt_state: optax.OptState) -> optax.OptState:
    """Moments back in the memory of the host; counts stay. Inside `jax.jit`."""
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Host) if x.ndim else x, opt_state
    )


def _placements(shapes: TrainState, mesh: Mesh, layout: Layout) -> TrainState:
    placed = shardings(shapes, mesh)
    if not layout.offload:
        return placed
    stow = lambda x, s: s.with_memory_kind("pinned_host") if x.ndim else s  # noqa: E731
    return placed.replace(opt_state=jax.tree.map(stow, shapes.opt_state, placed.opt_state))


def _placed(shapes: TrainState, mesh: Mesh, layout: Layout) -> TrainState:
    one = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(one, shapes, _placements(shapes, mesh, layout))


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    lora: LoraConfig | None = None,
    layout: Layout = Layout(),
) -> TrainState:
    """Shapes, dtypes and shardings of the whole state; nothing is allocated.

    With `lora`, adapters train and the model is frozen in `lora.base_dtype`.
    """
    model = abstract_model(config, mesh, dtype=jnp.dtype(lora.base_dtype if lora else "float32"))

    def whole(model: Llama, key: jax.Array) -> TrainState:
        return _piped(_around(model, optimizer, lora, layout, key), config, mesh, layout)

    return _placed(jax.eval_shape(whole, model, jax.random.key(0)), mesh, layout)


def _is_natural(config: ModelConfig, mesh: Mesh, layout: Layout) -> bool:
    """Whether layers stand in their natural order."""
    stages, rounds = mesh.shape["stage"], layout.rounds
    return rounds is None or is_stored_order(config.num_layers, stages=stages, rounds=rounds)


def _piped(state: TrainState, config: ModelConfig, mesh: Mesh, layout: Layout) -> TrainState:
    """Layers in natural order -> in that of the layout."""
    if _is_natural(config, mesh, layout):
        return state
    return to_pipeline_order(state, mesh, rounds=layout.rounds)


def to_pipeline(
    state: TrainState, config: ModelConfig, mesh: Mesh, *, layout: Layout
) -> TrainState:
    """A state at rest -> in its layout; the same one where that is how it rests."""
    return _rearranged(state, config, mesh, layout, lambda s: _piped(s, config, mesh, layout))


def to_natural(state: TrainState, config: ModelConfig, mesh: Mesh, *, layout: Layout) -> TrainState:
    """The reverse: for a while there are two."""
    back = lambda s: to_stored_order(s, config.num_layers, mesh, rounds=layout.rounds)  # noqa: E731
    return _rearranged(state, config, mesh, layout, back)


def _rearranged(
    state: TrainState, config: ModelConfig, mesh: Mesh, layout: Layout, function: Any
) -> TrainState:
    if _is_natural(config, mesh, layout):
        return state
    moved = lambda s: function(s.replace(opt_state=fetched(s.opt_state)))  # noqa: E731
    placed = _placements(jax.eval_shape(moved, state), mesh, layout)
    return jax.jit(moved, out_shardings=placed)(state)


def init_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    layout: Layout = Layout(),
) -> TrainState:
    """Random initial state, born sharded. The same seed gives the same weights on every mesh."""
    abstract = abstract_state(config, optimizer, mesh, layout=layout)
    placed = jax.tree.map(lambda x: x.sharding, abstract)

    def fresh(key: jax.Array) -> TrainState:
        state = _around(Llama(config, key), optimizer, None, layout, key)
        return _piped(state, config, mesh, layout)

    options = exact_options(mesh.devices.flat[0].platform)
    init: Any = jax.jit(fresh, out_shardings=placed, compiler_options=options)
    return init(jax.random.key(seed))


def state_around(
    model: Llama,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    lora: LoraConfig | None,
    seed: int,
    layout: Layout = Layout(),
) -> TrainState:
    """State of step 0, at rest, around given weights, which are taken over and not copied."""
    layout = layout.at_rest
    abstract = abstract_state(model.config, optimizer, mesh, lora=lora, layout=layout)
    rest = abstract.replace(model=None)
    placed = jax.tree.map(lambda x: x.sharding, rest)

    def make(key: jax.Array) -> TrainState:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract.model)
        return _around(zeros, optimizer, lora, layout, key).replace(model=None)

    return jax.jit(make, out_shardings=placed)(jax.random.key(seed)).replace(model=model)
