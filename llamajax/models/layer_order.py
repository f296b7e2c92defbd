"""In which order layers are stored: their own, or that of a pipeline.

On disk, in every exchange of weights and without a pipeline layers stand in their natural order.
With stages and rounds each stage's part of the stack holds its groups of layers one after the
other: with 2 stages and 2 rounds of one layer, (0, 2 | 1, 3). Where layers do not divide, the stack
is filled up with layers of zeros at its end: zero weights and zero norm scales make a block the
identity, with gradients and so AdamW updates of exactly zero, and no mask is needed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llamajax.sharding import is_stacked, is_weight, map_weights, stored_spec


def padded_layers(num_layers: int, *, stages: int, rounds: int) -> int:
    """Layers as stored for a pipeline: the next multiple of stages x rounds."""
    return -(-num_layers // (stages * rounds)) * stages * rounds


def pipeline_order(num_layers: int, *, stages: int, rounds: int) -> np.ndarray:
    """Layer (from `num_layers` on: one of zeros) at each place of the stored stack."""
    total = padded_layers(num_layers, stages=stages, rounds=rounds)
    by_round = np.arange(total).reshape(rounds, stages, total // (stages * rounds))
    return by_round.swapaxes(0, 1).reshape(-1)


def to_pipeline_order(tree: Any, mesh: Mesh, *, rounds: int) -> Any:
    """A tree with stacks in natural order -> with stacks in the order of the mesh's pipeline."""

    def one(stack: jax.Array) -> jax.Array:
        places = pipeline_order(stack.shape[0], stages=mesh.shape["stage"], rounds=rounds)
        filler = [(0, len(places) - stack.shape[0]), *[(0, 0)] * (stack.ndim - 1)]
        return jnp.pad(stack, filler)[places]

    return _stacks(one, tree, mesh)


def to_stored_order(tree: Any, num_layers: int, mesh: Mesh, *, rounds: int) -> Any:
    """The reverse of `arranged`; layers of zeros are left out."""
    places = pipeline_order(num_layers, stages=mesh.shape["stage"], rounds=rounds)
    return _stacks(lambda stack: stack[np.argsort(places)[:num_layers]], tree, mesh)


def _stacks(function: Callable[[jax.Array], jax.Array], tree: Any, mesh: Mesh) -> Any:
    """Inside `jax.jit`: `function` of every stack, laid out so that none of its layers is apart."""

    def one(leaf: Any) -> Any:
        if not is_weight(leaf) or not is_stacked(leaf):
            return leaf
        together = NamedSharding(mesh, stored_spec(leaf, mesh))
        stack = function(jax.sharding.reshard(leaf.get_value(), together))
        return leaf.replace(stack)

    return map_weights(one, tree)


def is_stored_order(num_layers: int, *, stages: int, rounds: int) -> bool:
    """Whether a pipeline stores layers as they stand anyway."""
    places = pipeline_order(num_layers, stages=stages, rounds=rounds)
    return np.array_equal(places, np.arange(num_layers))
