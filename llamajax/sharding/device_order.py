"""The order of devices on the mesh: fast links for the axes that communicate most.

Axes follow the order of AXES, so `tensor` (several transfers a layer) and `sequence` stay inside a
node, and `data` (once a step) and `stage` (one activation a microbatch) cross nodes. A *node* here
is what fast links join: a slice of TPUs, the GPUs of an NVLink domain, else the devices of one
process.
"""

import collections
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from llamajax.errors import UserError
from llamajax.sharding.axes import AXES

# Axes that may use the network between slices of TPUs: once a step, or an activation a microbatch.
SLOW_AXES = ("data", "stage")


def in_slice(device: jax.Device) -> bool:
    """Return whether a device is a TPU core, whose own links join all hosts of its slice."""
    return hasattr(device, "core_on_chip")  # GPUs have `coords` as well


def node_of(device: jax.Device) -> int:
    """Return the number of the node of a device."""
    slice_index = getattr(device, "slice_index", None)
    if slice_index is not None:
        return slice_index
    return 0 if in_slice(device) else device.process_index


def order_devices(
    sizes: Mapping[str, int], devices: Sequence[jax.Device], *, wired: bool = True
) -> np.ndarray:
    """Arrange devices in an array with one dimension an axis of `sizes`, in its order.

    Inside a node JAX decides, which knows how chips are wired; on a torus an axis may use a part of
    a physical one: 8 devices along `tensor` on v5p:4x4x4 are 2 x 4 of its chips. wired: False
    leaves that out, which takes time, where only nodes are asked for.
    """

    def inside_a_node(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
        if wired:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return np.asarray(devices, object).reshape(shape)

    shape = tuple(sizes.values())
    nodes = collections.Counter(node_of(d) for d in devices)
    if len(nodes) == 1:
        return inside_a_node(shape, devices)
    across, left = [], len(nodes)  # how many nodes each axis spans, the outermost first
    for size in shape:
        across.append(math.gcd(size, left))
        left //= across[-1]
    if left > 1 or len(set(nodes.values())) > 1:  # nodes do not divide over the axes
        ordered = sorted(devices, key=lambda d: (node_of(d), d.id))
        return np.asarray(ordered, object).reshape(shape)
    inside = tuple(n // a for n, a in zip(shape, across, strict=True))
    rows = [
        inside_a_node(inside, [d for d in devices if node_of(d) == node]) for node in sorted(nodes)
    ]
    whole = np.asarray(rows, object).reshape(*across, *inside)
    order = [i + offset for i in range(len(shape)) for offset in (0, len(shape))]
    return whole.transpose(order).reshape(shape)


def node_numbers(
    sizes: Mapping[str, int],
    devices: Sequence[jax.Device],
    node_of: Callable[[jax.Device], int] = node_of,
) -> list[int]:
    """Return the node at each place of the mesh, in its order."""
    return [node_of(device) for device in order_devices(sizes, devices, wired=False).flat]


def check_slices(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> None:
    """Raise UserError where an axis other than SLOW_AXES would cross slices of TPUs."""
    slices = len({node_of(d) for d in devices})
    outer = math.prod(sizes[axis] for axis in SLOW_AXES)
    if slices == 1 or not in_slice(devices[0]) or outer % slices == 0:
        return
    missing = slices // math.gcd(slices, outer)
    inner = {axis: n for axis, n in sizes.items() if axis not in SLOW_AXES and n > 1}
    shown = " x ".join(f"{axis} {n}" for axis, n in inner.items())
    nearest = "choose another number of slices"
    for axis in inner:
        if inner[axis] % missing == 0:
            data = sizes["data"] * missing
            nearest = f"for example mesh.data={data} mesh.{axis}={inner[axis] // missing}"
            break
    raise UserError(
        f"mesh: {shown} does not fit into one of {slices} slices of {len(devices) // slices} "
        f"devices, and only {' and '.join(SLOW_AXES)} may go over the network between slices; make "
        f"mesh.data x mesh.stage a multiple of {slices}: {nearest}"
    )


def nodes_per_axis(mesh: Mesh, node_of: Callable[[jax.Device], int] = node_of) -> dict[str, int]:
    """Return the number of nodes along each axis that has more than one device."""
    found = {}
    for number, axis in enumerate(AXES):
        if mesh.shape[axis] > 1:
            lines = np.moveaxis(mesh.devices, number, -1).reshape(-1, mesh.shape[axis])
            found[axis] = max(len({node_of(d) for d in line}) for line in lines)
    return found


def device_order_table(mesh: Mesh, node_of: Callable[[jax.Device], int] = node_of) -> list[str]:
    """Return lines with each axis's size and whether it crosses nodes; none for one node."""
    if len({node_of(d) for d in mesh.devices.flat}) == 1:
        return []
    lines = []
    word = "slice" if in_slice(mesh.devices.flat[0]) else "node"
    for axis, nodes in nodes_per_axis(mesh, node_of).items():
        size = mesh.shape[axis]
        where = f"inside a {word}"
        if nodes > 1:
            where = f"across {nodes} {word}s, {size // nodes} in each"
            if axis in ("tensor", "sequence"):
                where += "; it talks in every layer: slow, make it fit into one"
        lines.append(f"{axis:<9}{size:<4} {where}")
    return lines
