"""The order in which stacked layers are stored: that of the model, or that of a pipeline.

On disk, in other file formats and without a pipeline, layers are in the order of the model
(*stored order*). For a pipeline each stage's part of the stack holds its groups of layers one
after the other: with 2 stages and 2 rounds of one layer, (0, 2 | 1, 3). Where layers do not divide,
layers of zeros are added at the end: zero weights and zero norm scales make a block the identity,
with gradients and so AdamW updates of exactly zero, and no mask is needed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llamajax.sharding import is_stacked, is_weight, map_weights, stored_spec


def padded_layers(num_layers: int, *, stages: int, rounds: int) -> int:
    """Return the number of layers stored for a pipeline: the next multiple of stages x rounds."""
    return -(-num_layers // (stages * rounds)) * stages * rounds


def pipeline_order(num_layers: int, *, stages: int, rounds: int) -> np.ndarray:
    """Return the layer at each place of a pipeline's stack; those from `num_layers` on are zero."""
    total = padded_layers(num_layers, stages=stages, rounds=rounds)
    return np.arange(total).reshape(rounds, stages, -1).swapaxes(0, 1).reshape(-1)


def is_stored_order(num_layers: int, *, stages: int, rounds: int) -> bool:
    """Return whether the order of a pipeline is that of the model."""
    order = pipeline_order(num_layers, stages=stages, rounds=rounds)
    return np.array_equal(order, np.arange(num_layers))


def to_pipeline_order(tree: Any, mesh: Mesh, *, rounds: int) -> Any:
    """Reorder the stacks of a tree for the mesh's pipeline; inside `jax.jit`."""

    def reorder(stack: jax.Array) -> jax.Array:
        order = pipeline_order(stack.shape[0], stages=mesh.shape["stage"], rounds=rounds)
        padding = [(0, len(order) - stack.shape[0]), *[(0, 0)] * (stack.ndim - 1)]
        return jnp.pad(stack, padding)[order]

    return _map_stacks(reorder, tree, mesh)


def to_stored_order(tree: Any, num_layers: int, mesh: Mesh, *, rounds: int) -> Any:
    """Invert `to_pipeline_order`; layers of zeros are left out."""
    order = pipeline_order(num_layers, stages=mesh.shape["stage"], rounds=rounds)
    return _map_stacks(lambda stack: stack[np.argsort(order)[:num_layers]], tree, mesh)


def _map_stacks(function: Callable[[jax.Array], jax.Array], tree: Any, mesh: Mesh) -> Any:
    """Apply `function` to every stack, resharded first so that every device has all layers."""

    def apply(leaf: Any) -> Any:
        if not is_weight(leaf) or not is_stacked(leaf):
            return leaf
        sharding = NamedSharding(mesh, stored_spec(leaf, mesh))
        return leaf.replace(function(jax.sharding.reshard(leaf.get_value(), sharding)))

    return map_weights(apply, tree)
