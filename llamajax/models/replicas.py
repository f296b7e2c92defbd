"""Digests of what the copies of a model compute and hold, to find a device that is wrong.

Devices that compute the same tokens with the same weights run the same program on the same numbers:
one whose digest differs is broken. Nothing that is compared here has been summed over the copies,
which would hide whose mistake it was.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llamajax.models.llama import Block, Compute, LayerInputs, Llama
from llamajax.ops.cross_entropy import cross_entropy
from llamajax.sharding import TOKEN_AXES
from llamajax.sharding.collectives import pcast_varying, pcast_varying_tree

_ODD = 2654435761  # of Knuth's multiplicative hash; odd, so that one flipped bit changes the sum


def digest(tree: Any) -> jax.Array:
    """Return a uint32 of the bits of a tree's arrays, in order; any single flipped bit changes it.

    It is a sum of integers, so the order of adding does not change it.
    """
    total = jnp.uint32(0)
    for x in jax.tree.leaves(tree):
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, kind).reshape(-1).astype(jnp.uint32)
        weights = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(_ODD) * 2 + 1
        total = total * jnp.uint32(31) + jnp.sum(bits * weights, dtype=jnp.uint32)
    return total


def compute_digests(model: Llama, tokens_BT: jax.Array, compute: Compute) -> jax.Array:
    """Return digests, uint32 (2,), of all blocks and of the loss, forward and backward.

    The tokens are the same on all devices. Each block's gradients, of its input and of its weights
    before any reduction, are those for its own output as the incoming gradient: the same products
    as in training, and a backward pass that keeps nothing for later. Where stages split the layers,
    each device runs those that it has.
    """
    float8 = compute.float8  # with scales by rows, which need no collective
    compute = dataclasses.replace(
        compute,
        float8=float8 and dataclasses.replace(float8, scaling="row"),
        split_tokens=False,
        remat="none",
        remat_keep=(),
        remat_offload=(),
        attention="blocked" if compute.attention == "split" else compute.attention,
    )
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    batch = pcast_varying({"tokens": tokens_BT, "positions": positions_BT}, TOKEN_AXES)
    model = pcast_varying_tree(model)

    def visit(block: Block, x_BTD: jax.Array, so_far: jax.Array, inputs: LayerInputs):
        out_BTD, vjp = jax.vjp(lambda b, x: b(x, inputs, inputs.attend)[0], block, x_BTD)
        return out_BTD, so_far * jnp.uint32(31) + digest((out_BTD, vjp(out_BTD))), None

    zero = pcast_varying(jnp.uint32(0), tuple(jax.sharding.get_abstract_mesh().manual_axes))
    x_BTD, blocks, _ = model.forward(batch, compute, visit, zero)

    def loss(x_BTD: jax.Array) -> jax.Array:
        return cross_entropy(
            x_BTD,
            jax.lax.stop_gradient(model.head_or_embedding[...]),
            batch["tokens"],
            jnp.ones_like(batch["tokens"], dtype=bool),
            vocab_size=model.config.vocab_size,
            chunk_tokens=compute.loss_chunk_tokens,
            z_weight=compute.z_weight,
        ).objective

    return jnp.stack([blocks, digest(jax.value_and_grad(loss)(x_BTD))])


def weight_digests(tree: Any) -> jax.Array:
    """Return a digest of this device's part of each array of a tree, uint32 (n,), in tree order."""
    return jnp.stack([digest(leaf) for leaf in jax.tree.leaves(tree)])
