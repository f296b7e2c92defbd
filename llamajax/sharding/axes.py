"""The two maps from dimension letters to mesh axes, and the shardings that follow from them.

The letters are those of `models/llama.py`. WEIGHTS says where weights are stored, ACTIVATIONS where
activations are computed. What only WEIGHTS splits is gathered on use: that difference is FSDP.
Tokens are split inside the step alone: over `sequence` everywhere, and over `tensor` between pairs
of matrices.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Outermost first: neighbors along the last axis are nearest on the machine, and `tensor`
# communicates most.
AXES = ("data", "stage", "fsdp", "sequence", "tensor")

BATCH_AXES = ("data", "fsdp")

# The targets of a step are split over these: sums over all tokens are sums over all of them.
TOKEN_AXES = ("data", "fsdp", "sequence", "stage")

Table = Mapping[str, str | tuple[str, ...]]

WEIGHTS: Table = {
    "L": "stage", "V": "tensor", "D": "fsdp", "F": "tensor", "N": "tensor", "K": "tensor",
}  # fmt: skip

# For layers whose number `stage` does not divide: on disk, and while they are reordered.
STORED_WEIGHTS: Table = {k: v for k, v in WEIGHTS.items() if k != "L"} | {"D": ("fsdp", "stage")}

ACTIVATIONS: Table = {"B": BATCH_AXES, "V": "tensor", "F": "tensor", "N": "tensor", "K": "tensor"}


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a table or of a PartitionSpec, as a tuple."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def spec(letters: str, table: Table, mesh: Mesh) -> PartitionSpec:
    """Return the PartitionSpec of an array with these dimensions, without axes of size 1.

    Raises ValueError when two dims would be split over the same mesh axis.
    """
    entries = []
    for letter in letters:
        axes = tuple(axis for axis in axes_of(table.get(letter)) if mesh.shape[axis] > 1)
        entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    used = [axis for entry in entries for axis in axes_of(entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"dims {letters!r} map two dims to one mesh axis: {entries}")
    return PartitionSpec(*entries)


def is_weight(leaf: Any) -> bool:
    """Return whether this node of a tree is a declared weight (or a moment of one).

    One that an optimizer has masked out (`optax.MaskedNode`) is none.
    """
    return isinstance(leaf, nnx.Variable) and not isinstance(leaf.get_value(), optax.MaskedNode)


def letters(weight: nnx.Variable) -> str:
    """Return the dimension letters of a stored weight: stacking over layers adds a leading L."""
    return "L" * is_stacked(weight) + weight.axes


def is_stacked(weight: nnx.Variable) -> bool:
    """Return whether a weight is stacked over layers."""
    return weight.get_value().ndim > len(weight.axes)


def map_weights(function: Any, tree: Any, *rest: Any) -> Any:
    """Apply `jax.tree.map` with declared weights as leaves."""
    return jax.tree.map(function, tree, *rest, is_leaf=is_weight)


def stored_spec(weight: nnx.Variable, mesh: Mesh) -> PartitionSpec:
    """Return a PartitionSpec of stacked layers with L whole: `stage` splits their width instead."""
    dims, shape = letters(weight), weight.get_value().shape
    for table in (STORED_WEIGHTS, WEIGHTS):
        entries = spec(dims.replace("L", "_"), table, mesh)
        parts = [math.prod(mesh.shape[a] for a in axes_of(entry)) for entry in entries]
        if not any(n % p for n, p in zip(shape, parts, strict=True)):
            break
    return entries


def specs(tree: Any, mesh: Mesh) -> Any:
    """Return the PartitionSpec of every leaf; what is no weight (counts, steps) is replicated.

    Layers are split over `stage` where their number divides, as it does in a TrainState, and by
    `stored_spec` where it does not.
    """

    def leaf_spec(leaf: Any) -> Any:
        if not is_weight(leaf):
            return PartitionSpec()
        if is_stacked(leaf) and leaf.get_value().shape[0] % mesh.shape["stage"]:
            return leaf.replace(stored_spec(leaf, mesh))
        return leaf.replace(spec(letters(leaf), WEIGHTS, mesh))

    return map_weights(leaf_spec, tree)


def same_parts(tree: Any, mesh: Mesh) -> Any:
    """Return the arrays of a tree as arrays on another mesh, whose devices need the same parts."""
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_single_device_arrays(
            x.shape, sharding, [shard.data for shard in x.addressable_shards]
        ),
        tree,
        shardings(tree, mesh),
    )


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Return the NamedSharding of every leaf of a tree (a model, a TrainState, or their shapes)."""
    return jax.tree.map(
        lambda entry: NamedSharding(mesh, entry),
        specs(tree, mesh),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )
