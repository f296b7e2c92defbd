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


def to_pipeline_order(tree: Any, order: np.ndarray, mesh: Mesh) -> Any:
    """Reorder the stacks of a tree as `pipeline_order` says; inside `jax.jit`."""

    def reorder(stack: jax.Array) -> jax.Array:
        padding = [(0, len(order) - stack.shape[0]), *[(0, 0)] * (stack.ndim - 1)]
        return jnp.pad(stack, padding)[order]

    return _map_stacks(reorder, tree, mesh)


def to_stored_order(tree: Any, order: np.ndarray, mesh: Mesh, *, num_layers: int) -> Any:
    """Invert `to_pipeline_order`; layers of zeros are left out."""
    return _map_stacks(lambda stack: stack[np.argsort(order)[:num_layers]], tree, mesh)


def _map_stacks(function: Callable[[jax.Array], jax.Array], tree: Any, mesh: Mesh) -> Any:
    """Apply `function` to every stack, resharded first so that every device has all layers."""

    def apply(leaf: Any) -> Any:
        if not is_weight(leaf) or not is_stacked(leaf):
            return leaf
        sharding = NamedSharding(mesh, stored_spec(leaf, mesh))
        return leaf.replace(function(jax.sharding.reshard(leaf.get_value(), sharding)))

    return map_weights(apply, tree)
