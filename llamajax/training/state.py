"""The state of a run: what a step takes and returns, and what a checkpoint holds."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from llamajax import optim
from llamajax.backends.platforms import exact_options
from llamajax.config.schema import LoraConfig, ModelConfig, RunConfig
from llamajax.models import layer_order
from llamajax.models.abstract import abstract_model
from llamajax.models.llama import Llama
from llamajax.models.lora import Adapters, attach, init_adapters
from llamajax.optim.guard import GuardState, new_guard
from llamajax.sharding import shardings


@struct.dataclass
class TrainState:
    """The arrays that a step changes, and the frozen weights that it reads.

    Step n means that n global batches were read, and n updates applied less those that a guard
    skipped. A step is therefore always the same place in the data and in the schedule.
    """

    step: jax.Array  # int32 scalar
    model: Llama  # float32 master weights; frozen where there are adapters
    opt_state: optax.OptState  # of what is trained
    adapters: Adapters | None = None
    guard: GuardState | None = None  # none: every update is applied
    average: Any | None = None  # moving average of what is trained

    @property
    def trained(self) -> Any:
        """The weights that updates change."""
        return self.model if self.adapters is None else self.adapters

    @property
    def whole(self) -> Llama:
        """The model with its adapters, if it has any; the forward pass runs it."""
        return attach(self.model, self.adapters)

    @property
    def averaged(self) -> Llama | None:
        """The model as `whole`, with the average of what is trained; None if there is none."""
        if self.average is None or self.adapters is None:
            return self.average
        return attach(self.model, self.average)

    @property
    def to_save(self) -> "TrainState":
        """The arrays of a checkpoint. Frozen weights are not among them: a start imports them."""
        return self if self.adapters is None else self.replace(model=None)

    def updated(
        self, trained: Any, decay: float | None, applied: jax.Array | None, **parts: Any
    ) -> "TrainState":
        """Return the state after one more step, with these parts; `decay` is the average's.

        applied: whether the update was applied; None: yes.
        """
        parts["model" if self.adapters is None else "adapters"] = trained
        moving = {"decay": decay, "step": self.step, "applied": applied}
        parts["average"] = optim.move_average(self.average, trained, **moving)
        return self.replace(step=self.step + 1, **parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateSpec:
    """What the state of a run consists of, and how it is stored on the mesh.

    lora: adapters train and the model is frozen in `lora.base_dtype`. rounds: of the pipeline whose
    order the layers have; None: stored order, as on disk. offload: whether the moments are in
    pinned host memory. guard_window: updates that the guard remembers; None: no guard. averages:
    whether it has an average of what is trained.
    """

    model: ModelConfig
    optimizer: optax.GradientTransformation
    mesh: Mesh
    lora: LoraConfig | None = None
    rounds: int | None = 1
    offload: bool = False
    guard_window: int | None = None
    averages: bool = False

    @classmethod
    def of(cls, config: RunConfig, mesh: Mesh) -> Self:
        """Return the spec of a run's state."""
        guard, train = config.guard, config.train
        guarded = guard.nonfinite != "off" or guard.spike_factor is not None
        layers, stages, rounds = config.model.num_layers, mesh.shape["stage"], train.pipeline_rounds
        facts = optim.RunFacts(
            seed=train.seed,
            dtype="float32" if train.dtype == "float32" else "bfloat16",
            layers=layer_order.pipeline_order(layers, stages=stages, rounds=rounds),
        )
        spec = cls(
            model=config.model,
            optimizer=optim.build(config.optim, steps=train.steps, facts=facts),
            mesh=mesh,
            lora=config.lora if config.lora.rank else None,
            rounds=rounds,
            offload=config.optim.offload,
            guard_window=guard.spike_window if guarded else None,
            averages=config.optim.ema_decay is not None,
        )
        plain = dataclasses.replace(spec, optimizer=optax.identity()).in_stored_order
        optim.check_state(config.optim, spec.optimizer, lambda: plain.abstract().trained)
        return spec

    @property
    def in_stored_order(self) -> Self:
        """The same state with its layers in stored order."""
        return dataclasses.replace(self, rounds=None)

    def abstract_model(self) -> Llama:
        """Return shapes, dtypes and shardings of the model, in stored order."""
        dtype = jnp.dtype(self.lora.base_dtype if self.lora else "float32")
        return abstract_model(self.model, self.mesh, dtype=dtype)

    def abstract(self) -> TrainState:
        """Return shapes, dtypes and shardings of the whole state; nothing is allocated."""

        def whole(model: Llama, key: jax.Array) -> TrainState:
            return self._in_pipeline_order(self._new(model, key))

        shapes = jax.eval_shape(whole, self.abstract_model(), jax.random.key(0))
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            self._shardings(shapes),
        )

    def init(self, seed: int) -> TrainState:
        """Return the state of step 0 with random weights, in shards; equal on any mesh."""
        out = jax.tree.map(lambda x: x.sharding, self.abstract())
        options = exact_options(self.mesh.devices.flat[0].platform)

        def fresh(key: jax.Array) -> TrainState:
            return self._in_pipeline_order(self._new(Llama(self.model, key), key))

        init: Any = jax.jit(fresh, out_shardings=out, compiler_options=options)
        return init(jax.random.key(seed))

    def from_weights(self, model: Llama, seed: int) -> TrainState:
        """Return the state of step 0 with these weights, in stored order; they are not copied."""
        abstract = self.in_stored_order.abstract()

        def rest(key: jax.Array) -> TrainState:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract.model)
            return self._new(zeros, key).replace(model=None, average=None)

        out = jax.tree.map(lambda x: x.sharding, abstract.replace(model=None, average=None))
        state = jax.jit(rest, out_shardings=out)(jax.random.key(seed)).replace(model=model)
        return self.with_own_average(state)

    def retyped(self, state: TrainState) -> TrainState:
        """Return the same arrays as a state of this spec's model, whose rope scaling may differ."""
        if state.model.config == self.model:
            return state
        treedef = jax.tree.structure(self.abstract())
        return jax.tree.unflatten(treedef, jax.tree.leaves(state))

    def to_pipeline_order(self, state: TrainState) -> TrainState:
        """Reorder a stored state's layers for the pipeline; no-op without one."""
        return self._reorder(state, layer_order.to_pipeline_order)

    def to_stored_order(self, state: TrainState) -> TrainState:
        """Invert `to_pipeline_order`; both copies exist until the old one is dropped."""
        invert = functools.partial(layer_order.to_stored_order, num_layers=self.model.num_layers)
        return self._reorder(state, invert)

    def with_own_guard(self, state: TrainState) -> TrainState:
        """Return a restored state with the guard of this spec; a new window begins empty."""
        window, found = self.guard_window, state.guard
        if window is None:
            return state.replace(guard=None)
        if found is not None and found.loss_W.shape == (window,):
            return state
        make: Any = jax.jit(new_guard, static_argnums=0, out_shardings=state.step.sharding)
        fresh = make(window)
        return state.replace(guard=fresh if found is None else fresh.replace(skipped=found.skipped))

    def with_own_average(self, state: TrainState) -> TrainState:
        """Return a state with the average of this spec; a new one begins at the weights."""
        if not self.averages:
            return state.replace(average=None)
        if state.average is not None:
            return state
        return state.replace(average=optim.copied(state.trained))

    def _new(self, model: Llama, key: jax.Array) -> TrainState:
        """Return the state of step 0 with these weights, in stored order; inside `jax.jit`."""
        adapters = init_adapters(self.model, self.lora, key) if self.lora else None
        guard = None if self.guard_window is None else new_guard(self.guard_window)
        state = TrainState(jnp.int32(0), model, opt_state=(), adapters=adapters, guard=guard)
        if self.averages:
            state = state.replace(average=jax.tree.map(jnp.copy, state.trained))
        with jax.numpy_dtype_promotion("standard"):
            return state.replace(opt_state=self.optimizer.init(state.trained))

    @functools.cached_property
    def _order(self) -> np.ndarray | None:
        """The order of the layers in the pipeline; None where it is stored order."""
        if self.rounds is None:
            return None
        layers, stages = self.model.num_layers, self.mesh.shape["stage"]
        order = layer_order.pipeline_order(layers, stages=stages, rounds=self.rounds)
        return None if np.array_equal(order, np.arange(layers)) else order

    def _in_pipeline_order(self, state: TrainState) -> TrainState:
        if self._order is None:
            return state
        return layer_order.to_pipeline_order(state, self._order, self.mesh)

    def _reorder(self, state: TrainState, function: Callable) -> TrainState:
        if self._order is None:
            return state

        def reordered(state: TrainState) -> TrainState:
            state = state.replace(opt_state=to_device(state.opt_state))
            return function(state, self._order, self.mesh)

        out = self._shardings(jax.eval_shape(reordered, state))
        return jax.jit(reordered, out_shardings=out)(state)

    def _shardings(self, shapes: TrainState) -> TrainState:
        """Return the sharding and the memory of every array of a state."""
        found = shardings(shapes, self.mesh)
        if not self.offload:
            return found

        def on_host(x: Any, sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
            return sharding.with_memory_kind("pinned_host") if x.ndim else sharding

        return found.replace(opt_state=jax.tree.map(on_host, shapes.opt_state, found.opt_state))


def to_device(opt_state: optax.OptState) -> optax.OptState:
    """Move moments to the device's memory, to compute with them; inside `jax.jit`."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), opt_state)


def to_host(opt_state: optax.OptState) -> optax.OptState:
    """Move moments back to the host's memory; counts stay. Inside `jax.jit`."""
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Host) if x.ndim else x, opt_state
    )
