"""Shardings of whole trees, read from the letters that each weight was declared with."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamajax.sharding.axes import WEIGHTS, spec


def is_weight(leaf: Any) -> bool:
    """Whether this node of a tree is a declared weight (or a moment of one)."""
    return isinstance(leaf, nnx.Variable)


def letters(weight: nnx.Variable) -> str:
    """Dimension letters of a weight as it is stored: stacking over layers adds a leading L."""
    return "L" * (weight.get_value().ndim - len(weight.axes)) + weight.axes


def map_weights(function: Any, tree: Any, *rest: Any) -> Any:
    """Tree with `function(weight, ...)` for each weight; other leaves are passed as well."""
    return jax.tree.map(function, tree, *rest, is_leaf=is_weight)


def specs(tree: Any, mesh: Mesh) -> Any:
    """PartitionSpec of every leaf; what is not a weight (counts, steps) is replicated."""

    def one(leaf: Any) -> Any:
        if not is_weight(leaf):
            return PartitionSpec()
        return leaf.replace(spec(letters(leaf), WEIGHTS, mesh))

    return map_weights(one, tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedSharding of every leaf of a tree (a model, a whole TrainState, or their shapes)."""
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs(tree, mesh), is_leaf=is_spec)
