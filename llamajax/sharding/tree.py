"""Shardings of whole trees, read from the letters that each weight was declared with."""

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamajax.sharding.axes import WEIGHTS, WEIGHTS_AT_REST, axes_of, spec


def is_weight(leaf: Any) -> bool:
    """Whether this node of a tree is a declared weight (or a moment of one)."""
    return isinstance(leaf, nnx.Variable)


def letters(weight: nnx.Variable) -> str:
    """Dimension letters of a weight as it is stored: stacking over layers adds a leading L."""
    return "L" * (weight.get_value().ndim - len(weight.axes)) + weight.axes


def is_stacked(weight: nnx.Variable) -> bool:
    """Whether a weight is one of layers, stacked along a leading dimension."""
    return weight.get_value().ndim > len(weight.axes)


def map_weights(function: Any, tree: Any, *rest: Any) -> Any:
    """Tree with `function(weight, ...)` for each weight; other leaves are passed as well."""
    return jax.tree.map(function, tree, *rest, is_leaf=is_weight)


def at_rest(weight: nnx.Variable, mesh: Mesh) -> PartitionSpec:
    """PartitionSpec of stacked layers of which every device has a part of each."""
    dims, shape = letters(weight), weight.get_value().shape
    for table in (WEIGHTS_AT_REST, WEIGHTS):
        entries = spec(dims.replace("L", "_"), table, mesh)
        parts = [math.prod(mesh.shape[a] for a in axes_of(entry)) for entry in entries]
        if not any(n % p for n, p in zip(shape, parts, strict=True)):
            break
    return entries


def specs(tree: Any, mesh: Mesh) -> Any:
    """PartitionSpec of every leaf; what is not a weight (counts, steps) is replicated.

    Layers are split over `stage` where their number divides, as it does in a TrainState; where it
    does not, `stage` splits their width instead.
    """

    def one(leaf: Any) -> Any:
        if not is_weight(leaf):
            return PartitionSpec()
        if is_stacked(leaf) and leaf.get_value().shape[0] % mesh.shape["stage"]:
            return leaf.replace(at_rest(leaf, mesh))
        return leaf.replace(spec(letters(leaf), WEIGHTS, mesh))

    return map_weights(one, tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedSharding of every leaf of a tree (a model, a whole TrainState, or their shapes)."""
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs(tree, mesh), is_leaf=is_spec)
