"""The two maps from dimension letters to mesh axes, and the shardings that follow from them.

Letters: B batch, T query position, S key position, D model, F feed-forward, N query heads,
K key-value heads, H head size, V vocabulary, L layers, R rank of an adapter (never split). An
*axis* is a mesh axis, a *dim* a letter. Tokens are split inside the step alone: over `sequence`
everywhere, and between the blocks over `tensor` as well.

WEIGHTS says where a weight lives, ACTIVATIONS where an activation flows. What a weight is split
over in the first and not in use is gathered on use: that difference is FSDP.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Outermost first: neighbours along the last axis are nearest on the machine; `tensor` talks most.
AXES = ("data", "stage", "fsdp", "sequence", "tensor")

BATCH_AXES = ("data", "fsdp")

# Along these the targets of a step are split: sums over all tokens go over all of them.
TOKEN_AXES = ("data", "fsdp", "sequence", "stage")

Table = Mapping[str, str | tuple[str, ...]]

WEIGHTS: Table = {
    "L": "stage", "V": "tensor", "D": "fsdp", "F": "tensor", "N": "tensor", "K": "tensor",
}  # fmt: skip

# Where layers rest that do not divide over `stage`: on disk, and while they come from or go there.
STORED_WEIGHTS: Table = {k: v for k, v in WEIGHTS.items() if k != "L"} | {"D": ("fsdp", "stage")}

ACTIVATIONS: Table = {"B": BATCH_AXES, "V": "tensor", "F": "tensor", "N": "tensor", "K": "tensor"}


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a table or of a PartitionSpec, as a tuple."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def spec(letters: str, table: Table, mesh: Mesh) -> PartitionSpec:
    """PartitionSpec of an array whose dims are `letters`; axes of size 1 split nothing.

    Raises ValueError when two dims would be split over the same mesh axis.
    """
    entries = [_split(table.get(letter), mesh) for letter in letters]
    used = [axis for entry in entries for axis in axes_of(entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"dims {letters!r} map two dims to one mesh axis: {entries}")
    return PartitionSpec(*entries)


def _split(entry: str | tuple[str, ...] | None, mesh: Mesh) -> str | tuple[str, ...] | None:
    """An entry without the axes that have one device: nothing is communicated along those."""
    kept = tuple(axis for axis in axes_of(entry) if mesh.shape[axis] > 1)
    return None if not kept else kept[0] if len(kept) == 1 else kept


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


def stored_spec(weight: nnx.Variable, mesh: Mesh) -> PartitionSpec:
    """PartitionSpec of stacked layers of which every device has a part of each."""
    dims, shape = letters(weight), weight.get_value().shape
    for table in (STORED_WEIGHTS, WEIGHTS):
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
            return leaf.replace(stored_spec(leaf, mesh))
        return leaf.replace(spec(letters(leaf), WEIGHTS, mesh))

    return map_weights(one, tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedSharding of every leaf of a tree (a model, a whole TrainState, or their shapes)."""
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs(tree, mesh), is_leaf=is_spec)
