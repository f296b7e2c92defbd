"""Which devices lie where on the mesh: fast links for the axes that talk most.

Axes are laid out in the order of AXES, so that `tensor` (several transfers a layer) and `sequence`
stay inside a node or slice, and `data` (once a step) and `stage` (one activation a microbatch)
cross. A *node* here is what fast links join: a slice of TPUs, the GPUs of an NVLink domain, else
the devices of one process.
"""

import collections
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from llamajax.sharding.axes import AXES


def node_of(device: jax.Device) -> int:
    """Number of the node of a device."""
    slice_index = getattr(device, "slice_index", None)
    return device.process_index if slice_index is None else slice_index


def placed(sizes: dict[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array with one dimension an axis of `sizes`, in its order.

    Inside a node JAX chooses, which knows how chips are wired; on a torus an axis may be laid over
    a part of a physical one: 8 devices along `tensor` on v5p:4x4x4 are 2 x 4 of its chips.
    """
    shape = tuple(sizes.values())
    nodes = collections.Counter(node_of(d) for d in devices)
    if len(nodes) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across = _across(shape, len(nodes))
    if across is None or len(set(nodes.values())) > 1:
        ordered = sorted(devices, key=lambda d: (node_of(d), d.id))
        return np.asarray(ordered, object).reshape(shape)
    inside = tuple(n // a for n, a in zip(shape, across, strict=True))
    rows = [
        mesh_utils.create_device_mesh(
            inside, [d for d in devices if node_of(d) == node], allow_split_physical_axes=True
        )
        for node in sorted(nodes)
    ]
    whole = np.asarray(rows, object).reshape(*across, *inside)
    order = [i + offset for i in range(len(shape)) for offset in (0, len(shape))]
    return whole.transpose(order).reshape(shape)


def _across(shape: Sequence[int], nodes: int) -> tuple[int, ...] | None:
    """How many nodes each axis spans, the outermost first; None where they do not come out even."""
    spans = []
    for size in shape:
        spans.append(math.gcd(size, nodes))
        nodes //= spans[-1]
    return tuple(spans) if nodes == 1 else None


def spans(mesh: Mesh) -> dict[str, int]:
    """For each axis with more than one device, the number of nodes along it."""
    found = {}
    for number, axis in enumerate(AXES):
        if mesh.shape[axis] > 1:
            lines = np.moveaxis(mesh.devices, number, -1).reshape(-1, mesh.shape[axis])
            found[axis] = max(len({node_of(d) for d in line}) for line in lines)
    return found


def table(mesh: Mesh) -> list[str]:
    """Lines for people, one an axis that is in use: its size, and whether it crosses nodes."""
    num_nodes = len({node_of(d) for d in mesh.devices.flat})
    if num_nodes == 1:
        return []
    lines = []
    for axis, nodes in spans(mesh).items():
        size = mesh.shape[axis]
        where = "inside a node" if nodes == 1 else f"across {nodes} nodes, {size // nodes} in each"
        if nodes > 1 and axis in ("tensor", "sequence"):
            where += "; it talks in every layer: slow, make it fit into a node"
        lines.append(f"{axis:<9}{size:<4} {where}")
    return lines
