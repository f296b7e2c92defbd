"""The two maps from the alphabet of dimensions to mesh axes, and their reading as PartitionSpecs.

Letters: B batch, T query position, S key position, D model, F feed-forward, N query heads,
K key-value heads, H head size, V vocabulary, L layers, R rank of an adapter (never split). An
*axis* is a mesh axis, a *dim* a letter. Tokens are split inside the step alone: over `sequence`
everywhere, and between the blocks over `tensor` as well.

WEIGHTS says where a weight lives, ACTIVATIONS where an activation flows. What a weight is split
over in the first and not in use is gathered on use: that difference is FSDP.
"""

from collections.abc import Mapping

from jax.sharding import Mesh, PartitionSpec

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
WEIGHTS_AT_REST: Table = {k: v for k, v in WEIGHTS.items() if k != "L"} | {"D": ("fsdp", "stage")}

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
