"""The state of a run: what a step takes and returns, and what a checkpoint holds."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from llamajax.backends.platforms import exact_options
from llamajax.config.schema import LoraConfig, ModelConfig
from llamajax.models import layer_order
from llamajax.models.abstract import abstract_model
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
        """The model that computes: with its adapters, where there are some."""
        return attach(self.model, self.adapters)

    @property
    def to_save(self) -> "TrainState":
        """What a checkpoint holds; frozen weights are read again from where they came from."""
        return self if self.adapters is None else self.replace(model=None)

    def updated(
        self, trained: Any, opt_state: optax.OptState, guard: GuardState | None
    ) -> "TrainState":
        """Return the state after one more step."""
        name = "model" if self.adapters is None else "adapters"
        parts = {name: trained, "opt_state": opt_state, "guard": guard}
        return self.replace(step=self.step + 1, **parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a state is stored on its mesh; changes no value.

    rounds: layers are in pipeline order for so many rounds; None: in stored order, as on disk.
    offload: the moments are in pinned host memory. guard_window: updates that the guard remembers;
    None: there is no guard.
    """

    rounds: int | None = 1
    offload: bool = False
    guard_window: int | None = None

    @property
    def stored_order(self) -> "Layout":
        """The same layout with layers in stored order."""
        return dataclasses.replace(self, rounds=None)


def _new_state(
    model: Llama,
    optimizer: optax.GradientTransformation,
    lora: LoraConfig | None,
    layout: Layout,
    key: jax.Array,
) -> TrainState:
    """Return the state of step 0 with these weights."""
    adapters = init_adapters(model.config, lora, key) if lora else None
    guard = None if layout.guard_window is None else new_guard(layout.guard_window)
    state = TrainState(step=jnp.int32(0), model=model, opt_state=(), adapters=adapters, guard=guard)
    with jax.numpy_dtype_promotion("standard"):
        return state.replace(opt_state=optimizer.init(state.trained))


def with_stored_guard(state: TrainState, stored: Mapping[str, jax.ShapeDtypeStruct]) -> TrainState:
    """Return an abstract state with the guard that a checkpoint holds.

    stored: the checkpoint's arrays by name. It may have no guard (of a run without, or older than
    guards), or one with another window.
    """
    names = {field.name: f"guard/{field.name}" for field in dataclasses.fields(GuardState)}
    if not all(name in stored for name in names.values()):
        return state.replace(guard=None)
    arrays = {
        field: jax.ShapeDtypeStruct(
            stored[name].shape, stored[name].dtype, sharding=state.step.sharding
        )
        for field, name in names.items()
    }
    return state.replace(guard=GuardState(**arrays))


def with_own_guard(state: TrainState, layout: Layout) -> TrainState:
    """Return a restored state with the guard of its layout; a new window begins empty."""
    window, found = layout.guard_window, state.guard
    if window is None:
        return state.replace(guard=None)
    if found is not None and found.loss_W.shape == (window,):
        return state
    make: Any = jax.jit(new_guard, static_argnums=0, out_shardings=state.step.sharding)
    fresh = make(window)
    return state.replace(guard=fresh if found is None else fresh.replace(skipped=found.skipped))


def to_device(opt_state: optax.OptState) -> optax.OptState:
    """Move moments to the device's memory, to compute with them; inside `jax.jit`."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), opt_state)


def to_host(opt_state: optax.OptState) -> optax.OptState:
    """Move moments back to the host's memory; counts stay. Inside `jax.jit`."""
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Host) if x.ndim else x, opt_state
    )


def _shardings(shapes: TrainState, mesh: Mesh, layout: Layout) -> TrainState:
    """Return the sharding and the memory of every array of a state."""
    found = shardings(shapes, mesh)
    if not layout.offload:
        return found

    def on_host(x: Any, sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
        return sharding.with_memory_kind("pinned_host") if x.ndim else sharding

    return found.replace(opt_state=jax.tree.map(on_host, shapes.opt_state, found.opt_state))


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    lora: LoraConfig | None = None,
    layout: Layout = Layout(),
) -> TrainState:
    """Return shapes, dtypes and shardings of the whole state; nothing is allocated.

    With `lora`, adapters train and the model is frozen in `lora.base_dtype`.
    """
    model = abstract_model(config, mesh, dtype=jnp.dtype(lora.base_dtype if lora else "float32"))

    def whole(model: Llama, key: jax.Array) -> TrainState:
        state = _new_state(model, optimizer, lora, layout, key)
        return _to_pipeline_order(state, config, mesh, layout)

    shapes = jax.eval_shape(whole, model, jax.random.key(0))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        _shardings(shapes, mesh, layout),
    )


def _is_stored_order(config: ModelConfig, mesh: Mesh, layout: Layout) -> bool:
    """Return whether pipeline order is the same as stored order."""
    stages, rounds = mesh.shape["stage"], layout.rounds
    return rounds is None or layer_order.is_stored_order(
        config.num_layers, stages=stages, rounds=rounds
    )


def _to_pipeline_order(
    state: TrainState, config: ModelConfig, mesh: Mesh, layout: Layout
) -> TrainState:
    if _is_stored_order(config, mesh, layout):
        return state
    return layer_order.to_pipeline_order(state, mesh, rounds=layout.rounds)


def to_pipeline_order(
    state: TrainState, config: ModelConfig, mesh: Mesh, *, layout: Layout
) -> TrainState:
    """Reorder a stored state's layers for the pipeline; no-op without one."""
    return _reorder(
        state, config, mesh, layout, lambda s: _to_pipeline_order(s, config, mesh, layout)
    )


def to_stored_order(
    state: TrainState, config: ModelConfig, mesh: Mesh, *, layout: Layout
) -> TrainState:
    """Invert `to_pipeline_order`; both copies exist until the old one is dropped."""
    return _reorder(
        state,
        config,
        mesh,
        layout,
        lambda s: layer_order.to_stored_order(s, config.num_layers, mesh, rounds=layout.rounds),
    )


def _reorder(
    state: TrainState,
    config: ModelConfig,
    mesh: Mesh,
    layout: Layout,
    function: Callable[[TrainState], TrainState],
) -> TrainState:
    if _is_stored_order(config, mesh, layout):
        return state

    def reordered(state: TrainState) -> TrainState:
        return function(state.replace(opt_state=to_device(state.opt_state)))

    out = _shardings(jax.eval_shape(reordered, state), mesh, layout)
    return jax.jit(reordered, out_shardings=out)(state)


def init_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    layout: Layout = Layout(),
) -> TrainState:
    """Return a random state of step 0, made in shards; the same weights for a seed on any mesh."""
    abstract = abstract_state(config, optimizer, mesh, layout=layout)

    def fresh(key: jax.Array) -> TrainState:
        state = _new_state(Llama(config, key), optimizer, None, layout, key)
        return _to_pipeline_order(state, config, mesh, layout)

    out = jax.tree.map(lambda x: x.sharding, abstract)
    options = exact_options(mesh.devices.flat[0].platform)
    init: Any = jax.jit(fresh, out_shardings=out, compiler_options=options)
    return init(jax.random.key(seed))


def state_from_weights(
    model: Llama,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    lora: LoraConfig | None,
    seed: int,
    layout: Layout = Layout(),
) -> TrainState:
    """Return the state of step 0 with these weights, in stored order; they are not copied."""
    layout = layout.stored_order
    abstract = abstract_state(model.config, optimizer, mesh, lora=lora, layout=layout)

    def rest(key: jax.Array) -> TrainState:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract.model)
        return _new_state(zeros, optimizer, lora, layout, key).replace(model=None)

    out = jax.tree.map(lambda x: x.sharding, abstract.replace(model=None))
    return jax.jit(rest, out_shardings=out)(jax.random.key(seed)).replace(model=model)
