"""Layers split over the mesh axis `stage`: microbatches flow through them as one SPMD program.

Every device runs the same scan over ticks. In a tick a stage takes a microbatch's activation, runs
its layers and passes the result on; only these activations cross stages. With R rounds a stage
holds R groups of layers and a microbatch visits it R times (interleaved schedule, Megatron-LM,
arXiv:2104.04473, section 2.2): the P - 1 idle ticks of a stage then cost one R-th as much.
Microbatches travel in groups of P, so that the last stage's result reaches the first stage in the
tick in which that needs it, and nothing waits in a buffer.

Embedding and head are not part of a stage: each stage embeds, and computes the loss of, every P-th
microbatch (`local_microbatches`). Embedded microbatches rotate to the first stage, finished ones
rotate from the last stage to where their loss is computed.

The backward pass of the scan keeps one input a tick and stage (`remat_stage`), not one a layer.
Weights are gathered over `fsdp` once, before the ticks; their gradients add up over ticks in
float32 and are reduced once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llamajax.sharding import collectives, map_weights
from llamajax.sharding.collectives import (
    cast_and_gather,
    copy_to_tensor,
    fsdp_dim,
    grad_sums_over_tensor,
)
from llamajax.sharding.float8 import Float8Weight

AXIS = "stage"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """How microbatches pass through the stages; read only where there is more than one stage.

    microbatch_size: rows of a microbatch on a device. rounds: groups of layers a stage.
    remat_stage: keep only a stage's input for the backward pass.
    """

    microbatch_size: int = 1
    rounds: int = 1
    remat_stage: bool = True


def num_stages() -> int:
    """Return the number of pipeline stages; 1 outside `shard_map`."""
    return collectives.axis_size(AXIS)


def num_ticks(*, stages: int, microbatches: int, rounds: int) -> int:
    """Return the ticks of a pass; a stage works in rounds x microbatches of them."""
    return rounds * microbatches + stages - 1


def bubble(*, stages: int, microbatches: int, rounds: int) -> float:
    """Return the share of the ticks in which a stage is idle."""
    return (stages - 1) / num_ticks(stages=stages, microbatches=microbatches, rounds=rounds)


def local_microbatches(x: jax.Array, *, microbatch_size: int) -> jax.Array:
    """Return the rows (of the leading dim) that this stage embeds and computes the loss of.

    They are every P-th microbatch of P stages.
    """
    stages = num_stages()
    if stages == 1:
        return x
    x_QPB = x.reshape(-1, stages, microbatch_size, *x.shape[1:])
    rank = collectives.axis_index(AXIS)
    local = jax.lax.dynamic_index_in_dim(x_QPB, rank, axis=1, keepdims=False)
    return local.reshape(-1, *x.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _grad_accumulator(x: jax.Array, dim: int | None, like: jax.Array) -> jax.Array:
    """Return float32 zeros of the shape of `like`, the gathered `x`.

    A gradient that reaches them is reduced over `fsdp` and becomes the gradient of `x`.
    """
    return collectives.pcast_varying_like(jnp.zeros(like.shape, jnp.float32), like)


def _grad_accumulator_backward(dim: int | None, _: None, grad: jax.Array):
    if dim is None:
        return collectives.psum(grad, "fsdp"), None
    return collectives.psum_scatter(grad, "fsdp", dim=dim), None


_grad_accumulator.defvjp(
    lambda x, dim, like: (_grad_accumulator(x, dim, like), None), _grad_accumulator_backward
)


@jax.custom_vjp
def _with_grad_to(value: jax.Array, accumulator: jax.Array) -> jax.Array:
    """Return `value` in float32; its gradient goes to `accumulator`."""
    return checkpoint_name(value.astype(jnp.float32), "gathered_weight")


_with_grad_to.defvjp(
    lambda value, accumulator: (_with_grad_to(value, accumulator), None),
    lambda _, grad: (None, grad),
)


Layers = tuple[Any, Any]  # of a stage: gathered weights, and what their gradients add up in


def gather_stage(blocks: Any, dtype: jnp.dtype, *, split_tokens: bool) -> Layers:
    """Gather a stage's stacked weights over `fsdp`, in `dtype`, for all its microbatches."""

    def gathered(weight: nnx.Variable) -> nnx.Variable:
        value, axes = jax.lax.stop_gradient(weight.get_value()), weight.axes
        value = cast_and_gather(value, axes, dtype, split_tokens=split_tokens)
        if isinstance(value, Float8Weight):
            kept = dtype if value.scale is None else jnp.float8_e4m3fn
            return weight.replace(dataclasses.replace(value, value=value.value.astype(kept)))
        return weight.replace(value if len(axes) == 1 else value.astype(dtype))

    def accumulator(weight: nnx.Variable, gathered: nnx.Variable) -> nnx.Variable:
        value, like = (jax.tree.leaves(w.get_value())[0] for w in (weight, gathered))
        if grad_sums_over_tensor(weight.axes, split_tokens=split_tokens):
            value = copy_to_tensor(value)
        dim = fsdp_dim(value, weight.axes)
        return weight.replace(_grad_accumulator(value, dim, like))

    weights = map_weights(gathered, blocks)
    return weights, map_weights(accumulator, blocks, weights)


def with_fp32_grad(layer: Layers) -> Any:
    """Return a layer's weights from a slice of `gather_stage`; gradients add up in float32."""

    def connect(weight: nnx.Variable, accumulator: nnx.Variable) -> nnx.Variable:
        value, into = weight.get_value(), accumulator.get_value()
        if isinstance(value, Float8Weight):
            joined = _with_grad_to(value.value, into)
            return weight.replace(dataclasses.replace(value, value=joined))
        return weight.replace(_with_grad_to(value, into))

    return map_weights(connect, *layer)


def run_pipeline(
    stage: Callable[[Layers, jax.Array, jax.Array, jax.Array], jax.Array],
    layers: Layers,
    x_QBTD: jax.Array,
    options: PipelineOptions,
) -> jax.Array:
    """Return this stage's local microbatches after all layers, (Q, B, T, D) like `x_QBTD`.

    `stage(layers, x_BTD, numbers, microbatch)` runs one group of layers, which have these numbers
    in the model, on the microbatch of that number. Q = microbatches / stages.
    """
    P, Q, rounds = num_stages(), x_QBTD.shape[0], options.rounds
    rank, period = collectives.axis_index(AXIS), rounds * P  # ticks that a group of P takes
    grouped = jax.tree.map(lambda w: w.reshape(rounds, -1, *w.shape[1:]), layers)
    size = jax.tree.leaves(grouped)[0].shape[1]

    def run_round(grouped, round_, x, numbers, microbatch):
        mine = jax.tree.map(lambda w: _at(w, round_) if rounds > 1 else w[0], grouped)
        return stage(mine, x, numbers, microbatch)

    if options.remat_stage:  # includes the choice of a group: outside it would be kept every tick
        run_round = jax.checkpoint(run_round, prevent_cse=False)

    def tick(carry, clock):
        ring, feed, done, finished = carry
        own = jnp.clip(clock - rank, 0, Q * period - 1)  # ticks since this stage began
        group, round_, member = own // period, own % period // P, own % P
        fresh = jnp.minimum(clock // period, Q - 1)
        feed = jnp.where(clock % period == 0, _at(x_QBTD, fresh), feed)
        x = jnp.where((rank == 0) & (round_ == 0), feed, ring)
        numbers = (round_ * P + rank) * size + jnp.arange(size)
        y = run_round(grouped, round_, x, numbers, group * P + member)
        done = jnp.where(rank == P - 1, y, collectives.ppermute(done, AXIS, by=-1))
        ended = clock + 2 - P  # all P microbatches of a group are done when it is a multiple
        slot = jnp.clip(ended // period - 1, 0, Q - 1)
        new = jnp.where((ended > 0) & (ended % period == 0), done, _at(finished, slot))
        finished = jax.lax.dynamic_update_index_in_dim(finished, new, slot, axis=0)
        ring = collectives.ppermute(y, AXIS, by=1)
        return (ring, collectives.ppermute(feed, AXIS, by=-1), done, finished), None

    ticks = num_ticks(stages=P, microbatches=Q * P, rounds=rounds)
    zero = collectives.pcast_varying(jnp.zeros_like(x_QBTD[0]), AXIS)
    zero = collectives.pcast_varying_like(zero, x_QBTD, *jax.tree.leaves(grouped))
    carry = (zero, zero, zero, collectives.pcast_varying_like(jnp.zeros_like(x_QBTD), zero))
    (*_, finished), _ = jax.lax.scan(tick, carry, jnp.arange(ticks))
    return finished


def _at(x: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, number, axis=0, keepdims=False)
