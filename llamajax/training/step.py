"""The jitted steps: one update, and one batch of evaluation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from llamajax import optim
from llamajax.backends.platforms import platform_facts
from llamajax.checkpoint import named_leaves
from llamajax.config.schema import GuardConfig, OptimConfig, TrainConfig
from llamajax.models.declare import named_key
from llamajax.models.llama import Batch, Compute, Llama, local_part
from llamajax.models.lora import drops_out, trainable
from llamajax.models.sharded_step import by_documents, sharded_step
from llamajax.optim import guard as guards
from llamajax.sharding import TOKEN_AXES, batch_sharding, batch_spec, specs
from llamajax.sharding.collectives import (
    axis_size,
    pcast_varying,
    pcast_varying_like,
    pcast_varying_tree,
    psum,
    psum_tree,
)
from llamajax.training.state import TrainState, to_device, to_host

Metrics = dict[str, jax.Array]


def _gradients(model: Llama, batch: Batch, *, compute: Compute, accumulation: int) -> Any:
    """Return the summed gradient, loss terms and target count of one device's part of a batch.

    Nothing is divided. Microbatches add up in float32: without `fsdp` in place, so no second
    gradient of the model exists; with it gradients are small, and XLA scatters them beside other
    products. `gather` reduces over `fsdp`, each microbatch; the end over axes of copies.
    """
    trained, joined = trainable(model)
    weights = pcast_varying_tree(trained)

    def forward(microbatch: Batch) -> tuple[Any, tuple[jax.Array, ...]]:
        def objective(trained: Any) -> Any:
            terms = joined(trained).loss_terms(microbatch, compute)
            return terms.objective, (terms.nll, terms.z)

        value, backward, terms = jax.vjp(objective, weights, has_aux=True)
        count = jnp.sum(local_part(microbatch["loss_mask"], compute), dtype=jnp.float32)
        return lambda *sums: backward.with_refs(*sums)(jnp.ones_like(value)), (*terms, count)

    values = jax.tree.map(lambda _: jax.ad.GradValue(), weights)
    if accumulation == 1:
        backward, scalars = forward(batch)
        (grads,) = backward(values)
    else:
        zeros = jax.tree.map(lambda x: pcast_varying_like(jnp.zeros_like(x), x), weights)
        sums = jax.tree.map(jax.new_ref, zeros)

        def add(scalars: tuple[jax.Array, ...], microbatch: Batch) -> tuple[Any, None]:
            backward, terms = forward(microbatch)
            if axis_size("fsdp") == 1:
                backward(sums)
            else:
                jax.tree.map(lambda s, g: jax.ref.addupdate(s, ..., g), sums, *backward(values))
            return jax.tree.map(jnp.add, scalars, terms), None

        zero = pcast_varying(pcast_varying_like(jnp.float32(0), batch["tokens"]), TOKEN_AXES)
        microbatches = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)
        scalars, _ = jax.lax.scan(add, (zero, zero, zero), microbatches)
        grads = jax.tree.map(jax.freeze, sums)
    return psum_tree(grads), psum(scalars, TOKEN_AXES)


def _dropout_keys(seed: int, step: jax.Array, tokens_BT: jax.Array, mesh: Mesh) -> jax.Array:
    """Return a key for each token of a step's global batch, the same on every mesh."""
    key = jax.random.fold_in(named_key(jax.random.key(seed), "dropout"), step)
    number_BT = jnp.arange(tokens_BT.size, dtype=jnp.int32).reshape(tokens_BT.shape)
    number_BT = jax.sharding.reshard(number_BT, batch_sharding(mesh))
    return jax.vmap(jax.vmap(lambda number: jax.random.fold_in(key, number)))(number_BT)


def mean_gradient(
    train_config: TrainConfig, compute: Compute, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[Any, tuple[jax.Array, ...]]]:
    """Return the function that computes gradient, loss, z-loss term, number of targets, fallback.

    The first three are means over the batch's targets. The last is 1 where the batch has too many
    documents for `compute.attention`, and another one was used. To be called inside `jax.jit`.
    """
    accumulation = train_config.accumulation_steps

    def local(model: Llama, batch: Batch) -> Any:
        def run(used: Compute) -> Any:
            sums = _gradients(model, batch, compute=used, accumulation=accumulation)
            return *sums, jnp.float32(used.attention != compute.attention)

        rows = batch["tokens"].shape[0] // accumulation
        return by_documents(run, batch, compute, rows=rows)

    def gradient(state: TrainState, batch: Batch) -> Any:
        model = state.whole
        outputs = (specs(state.trained, mesh), PartitionSpec(), PartitionSpec())
        if drops_out(state.adapters):
            keys = _dropout_keys(train_config.seed, state.step, batch["tokens"], mesh)
            batch = dict(batch) | {"dropout_keys": keys}
        run = sharded_step(local, mesh, model, (batch_spec(mesh),), outputs, compute)
        sums, (nll, z, count), fallback = run(model, batch)
        divisor = jnp.maximum(count, 1.0)  # a batch of prompts alone has no target: no gradient
        grads = jax.tree.map(lambda g: g / divisor, sums)
        loss = jnp.where(count > 0, nll / divisor, jnp.nan)  # and no loss
        return grads, (loss, z / divisor, count, fallback)

    return gradient


def train_step(
    optimizer: optax.GradientTransformation,
    optim_config: OptimConfig,
    train_config: TrainConfig,
    compute: Compute,
    mesh: Mesh,
    guard: GuardConfig | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return the jitted update of one global batch, its state donated; guarded if the state is.

    A step whose update is left out returns weights and optimizer state bit for bit as they were.
    """
    rate = optim.schedule(optim_config, steps=train_config.steps)
    gradient = mean_gradient(train_config, compute, mesh)
    offload = optim_config.offload
    by_branch = offload and platform_facts(mesh.devices.flat[0].platform).host_branches

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, (loss, z, count, fallback) = gradient(state, batch)
        norm = optax.tree.norm(grads)
        metrics = {"loss": loss, "grad_norm": norm, "target_tokens": count}
        metrics["learning_rate"] = rate(state.step + 1)
        if compute.attention == "cudnn":
            metrics["split_attention"] = fallback
        memory, applied = state.guard, None
        if memory is not None:
            seen = {"loss": loss, "grad_norm": norm}
            verdict = guards.decide(memory, **seen, config=guard)
            memory, applied = guards.advance(memory, verdict, **seen), verdict.reason == 0
            metrics |= _guard_metrics(verdict, memory, grads)
        if by_branch:
            trained, opt_state = _updated_on_host(optimizer, grads, state, norm, applied)
        else:
            trained, opt_state = _updated(optimizer, grads, state, applied, offload=offload)
        if compute.z_weight:
            metrics["z_loss"] = compute.z_weight * z
        parts = {"opt_state": opt_state, "guard": memory}
        return state.updated(trained, optim_config.ema_decay, applied, **parts), metrics

    return jax.jit(step, donate_argnums=0)


def _updated(
    optimizer: optax.GradientTransformation,
    grads: Any,
    state: TrainState,
    applied: jax.Array | None,
    *,
    offload: bool,
) -> tuple[Any, optax.OptState]:
    """Return weights and optimizer state after the update; unchanged where it is not `applied`."""
    old = (state.trained, to_device(state.opt_state) if offload else state.opt_state)
    new = optim.apply(optimizer, grads, old[1], state.trained, step=state.step)
    trained, opt_state = new if applied is None else guards.select_update(applied, new, old)
    return trained, to_host(opt_state) if offload else opt_state


def _updated_on_host(
    optimizer: optax.GradientTransformation,
    grads: Any,
    state: TrainState,
    norm: jax.Array,
    applied: jax.Array | None,
) -> tuple[Any, optax.OptState]:
    """Do what `_updated` does, with moments copied from the host after the gradients are there.

    Left to itself, libtpu copies the largest before the forward pass, where they take the memory
    that was to be saved; a barrier does not delay the copies. What a branch needs is copied when
    the branch is taken, so the update is a branch whose condition depends on the gradients.
    """

    def update(trained: Any, on_host: optax.OptState) -> tuple[Any, optax.OptState]:
        new, moments = optim.apply(optimizer, grads, to_device(on_host), trained, step=state.step)
        return new, to_host(moments)

    def leave(trained: Any, on_host: optax.OptState) -> tuple[Any, optax.OptState]:
        return trained, to_host(on_host)  # no copy: it makes the two branches' types alike

    taken = ~(norm < 0) if applied is None else applied  # a norm is never negative
    return jax.lax.cond(taken, update, leave, state.trained, state.opt_state)


def _guard_metrics(verdict: guards.GuardDecision, memory: guards.GuardState, grads: Any) -> Metrics:
    """Return the metrics of a guarded step; `weight_norms`, one a weight, make up `grad_norm`."""
    norms = [optax.tree.norm(g) for g in named_leaves(grads).values()]
    return {
        "update_skipped": verdict.reason,
        "skipped_updates": memory.skipped,
        "skipped_in_a_row": memory.in_a_row,
        "loss_limit": verdict.loss_limit,
        "grad_norm_limit": verdict.grad_norm_limit,
        "weight_norms": jnp.stack(norms),
    }


def eval_step(
    compute: Compute, mesh: Mesh
) -> Callable[[Llama, Batch], tuple[jax.Array, jax.Array]]:
    """Return the jitted sum of negative log-likelihoods and number of targets of a batch."""

    def local(model: Llama, batch: Batch) -> tuple[jax.Array, jax.Array]:
        def run(compute: Compute) -> jax.Array:
            return pcast_varying_tree(model).loss_terms(batch, compute).nll

        nll = by_documents(run, batch, compute)
        count = jnp.sum(local_part(batch["loss_mask"], compute), dtype=jnp.float32)
        return psum((nll, count), TOKEN_AXES)

    def step(model: Llama, batch: Batch) -> tuple[jax.Array, jax.Array]:
        outputs = (PartitionSpec(), PartitionSpec())
        return sharded_step(local, mesh, model, (batch_spec(mesh),), outputs, compute)(model, batch)

    return jax.jit(step)
