"""Layers split over the mesh axis `stage`: microbatches flow through them as one SPMD program.

Every device runs the same scan over ticks. In a tick a stage takes a microbatch's activation, runs
its layers and passes the result on; only boundary activations cross stages. With R rounds a stage
holds R groups of layers and a microbatch comes by R times (interleaved schedule, Megatron-LM,
arXiv:2104.04473, section 2.2): the P - 1 idle ticks of a stage then cost one R-th as much. The
microbatches go round in groups of P, so that the last stage's result reaches the first stage just
when that wants it, and nothing waits in a buffer.

Embedding and head are not part of a stage: each stage embeds, and computes the loss of, every P-th
microbatch (`own_rows`). The embedded ones rotate to the first stage as it takes them, the finished
ones rotate from the last stage to where their loss is computed.

Differentiated, the scan keeps one input a tick and stage (`remat_stage`), not one a layer. Weights
are gathered over `fsdp` once, before the ticks; their gradients add up over ticks in float32 and
are reduced once.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llamajax.sharding import collectives, map_weights
from llamajax.sharding.collectives import fsdp_dim, in_use, is_shared, shared

AXIS = "stage"


def num_stages() -> int:
    """Pipeline stages here; 1 outside `shard_map`."""
    return jax.lax.axis_size(AXIS) if collectives.is_split(AXIS) else 1


def num_ticks(*, stages: int, microbatches: int, rounds: int) -> int:
    """Ticks of a pass; a stage works in rounds x microbatches of them."""
    return rounds * microbatches + stages - 1


def bubble(*, stages: int, microbatches: int, rounds: int) -> float:
    """Share of the ticks in which a stage has nothing to do."""
    return (stages - 1) / num_ticks(stages=stages, microbatches=microbatches, rounds=rounds)


def own_rows(x: jax.Array, *, microbatch_size: int) -> jax.Array:
    """The rows (of the leading dim) whose embedding and loss are this stage's: every P-th
    microbatch; all rows where there is one stage."""
    stages = num_stages()
    if stages == 1:
        return x
    rest = x.shape[1:]
    grouped = x.reshape(-1, stages, microbatch_size, *rest)
    own = jax.lax.dynamic_index_in_dim(grouped, collectives.index(AXIS), axis=1, keepdims=False)
    return own.reshape(-1, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _receiver(x: jax.Array, dim: int | None, like: jax.Array) -> jax.Array:
    """Float32 zeros of the shape of `like`, the gathered `x`: what a gradient adds up in."""
    return collectives.varying_like(jnp.zeros(like.shape, jnp.float32), like)


def _receiver_backward(dim: int | None, _: None, grad: jax.Array):
    if dim is None:
        return collectives.total(grad, "fsdp"), None
    return collectives.sum_scattered(grad, "fsdp", dim=dim), None


_receiver.defvjp(lambda x, dim, like: (_receiver(x, dim, like), None), _receiver_backward)


@jax.custom_vjp
def _credited(value: jax.Array, receiver: jax.Array) -> jax.Array:
    """`value`, whose gradient goes to `receiver` in float32."""
    return value


_credited.defvjp(
    lambda value, receiver: (value, None), lambda _, grad: (None, grad.astype(jnp.float32))
)


Layers = tuple[Any, Any]  # of a stage: the values in use, and what their gradients add up in


def gathered_once(blocks: Any, dtype: jnp.dtype, *, split_tokens: bool) -> Layers:
    """A stage's stacked weights, whole along `fsdp` and in `dtype`, for all its microbatches."""

    def value(weight: nnx.Variable) -> nnx.Variable:
        stored = jax.lax.stop_gradient(weight.get_value())
        return weight.replace(in_use(stored, weight.axes, dtype, split_tokens=split_tokens))

    def receiver(weight: nnx.Variable, value: nnx.Variable) -> nnx.Variable:
        stored = weight.get_value()
        if is_shared(weight.axes, split_tokens=split_tokens):
            stored = shared(stored)
        dim = fsdp_dim(stored, weight.axes)
        return weight.replace(_receiver(stored, dim, value.get_value()))

    values = map_weights(value, blocks)
    return values, map_weights(receiver, blocks, values)


def credited(layer: Layers) -> Any:
    """One layer's weights, from its part of what `gathered_once` gives."""

    def one(value: nnx.Variable, receiver: nnx.Variable) -> nnx.Variable:
        return value.replace(_credited(value.get_value(), receiver.get_value()))

    return map_weights(one, *layer)


def pipelined(
    stage: Callable[[Layers, jax.Array, jax.Array, jax.Array], jax.Array],
    layers: Layers,
    x_QBTD: jax.Array,
    *,
    rounds: int,
    remat_stage: bool,
) -> jax.Array:
    """Activations after all layers of this stage's own microbatches, (Q, B, T, D) like `x_QBTD`.

    `stage(layers, x_BTD, numbers, microbatch)` runs one group of layers, which have these numbers
    in the model, on the microbatch of that number. Q = microbatches / stages.
    """
    P, Q = num_stages(), x_QBTD.shape[0]
    rank, in_group = collectives.index(AXIS), rounds * P
    grouped = jax.tree.map(lambda w: w.reshape(rounds, -1, *w.shape[1:]), layers)
    size = jax.tree.leaves(grouped)[0].shape[1]

    def turned(grouped, turn, x, numbers, microbatch):
        mine = jax.tree.map(lambda w: _at(w, turn) if rounds > 1 else w[0], grouped)
        return stage(mine, x, numbers, microbatch)

    if remat_stage:  # around the choice of a group: one chosen outside would be kept at every tick
        turned = jax.checkpoint(turned, prevent_cse=False)

    def tick(carry, clock):
        ring, feed, done, finished = carry
        own = jnp.clip(clock - rank, 0, Q * in_group - 1)  # ticks since this stage began
        group, turn, place = own // in_group, own % in_group // P, own % P
        fresh = jnp.minimum(clock // in_group, Q - 1)
        feed = jnp.where(clock % in_group == 0, _at(x_QBTD, fresh), feed)
        x = jnp.where((rank == 0) & (turn == 0), feed, ring)
        numbers = (turn * P + rank) * size + jnp.arange(size)
        y = turned(grouped, turn, x, numbers, group * P + place)
        done = jnp.where(rank == P - 1, y, collectives.passed(done, AXIS, by=-1))
        ended = clock + 2 - P  # all P microbatches of a group are done when it is a multiple
        slot = jnp.clip(ended // in_group - 1, 0, Q - 1)
        new = jnp.where((ended > 0) & (ended % in_group == 0), done, _at(finished, slot))
        finished = jax.lax.dynamic_update_index_in_dim(finished, new, slot, axis=0)
        ring = collectives.passed(y, AXIS, by=1)
        return (ring, collectives.passed(feed, AXIS, by=-1), done, finished), None

    ticks = num_ticks(stages=P, microbatches=Q * P, rounds=rounds)
    zero = collectives.varying(jnp.zeros_like(x_QBTD[0]), AXIS)
    zero = collectives.varying_like(zero, x_QBTD, *jax.tree.leaves(grouped))
    carry = (zero, zero, zero, collectives.varying_like(jnp.zeros_like(x_QBTD), zero))
    (*_, finished), _ = jax.lax.scan(tick, carry, jnp.arange(ticks))
    return finished


def _at(x: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, number, axis=0, keepdims=False)
