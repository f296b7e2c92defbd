"""The device mesh of a run, and batches on it."""

import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llamajax.config.schema import MeshConfig
from llamajax.errors import UserError
from llamajax.sharding.axes import ACTIVATIONS, AXES, BATCH_AXES, spec
from llamajax.sharding.device_order import check_slices, order_devices


def axis_sizes(config: MeshConfig, *, num_devices: int) -> dict[str, int]:
    """Return the devices along each axis, in the order of AXES, with the -1 resolved.

    Raises UserError when the product is not `num_devices`.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if fixed and num_devices % fixed == 0:
        sizes = {axis: num_devices // fixed if n == -1 else n for axis, n in sizes.items()}
    if math.prod(sizes.values()) != num_devices or -1 in sizes.values():
        shown = " x ".join(f"{axis} {n}" for axis, n in sizes.items() if n != 1) or "1"
        raise UserError(
            f"mesh: {shown} does not make {num_devices} devices, the number that is here. "
            "Set the mesh axes so that their product is that number; one of them may be -1 "
            "(for example fsdp=-1) to take all that are left."
        )
    return sizes


def build_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Build a mesh over `devices` with all AXES (size 1 where unused), of Explicit axis types.

    Raises UserError when the sizes do not fit the devices, or when slices of TPUs would have to
    share an axis that communicates in every layer.
    """
    sizes = axis_sizes(config, num_devices=len(devices))
    check_slices(sizes, devices)
    explicit = (AxisType.Explicit,) * len(sizes)
    return Mesh(order_devices(sizes, devices), tuple(sizes), axis_types=explicit)


def join_sequence(mesh: Mesh) -> Mesh:
    """Return the mesh with its devices along `sequence` as further ones along `data`."""
    sizes = dict(mesh.shape)
    devices = np.moveaxis(mesh.devices, AXES.index("sequence"), 1)
    sizes["data"] *= sizes["sequence"]
    sizes["sequence"] = 1
    return Mesh(devices.reshape(*sizes.values()), AXES, axis_types=mesh.axis_types)


def describe(mesh: Mesh) -> str:
    """Return the axes in use, on one line for people."""
    used = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1)
    return f"{used or 'one device'} ({mesh.size} device{'s' if mesh.size > 1 else ''})"


def batch_shards(mesh: Mesh) -> int:
    """Return the number of parts that the batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_spec(mesh: Mesh) -> PartitionSpec:
    """Return the PartitionSpec of a (B, T) array of samples: whole rows; the step splits tokens."""
    return spec("BT", ACTIVATIONS, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a (B, T) array of samples."""
    return NamedSharding(mesh, batch_spec(mesh))


def local_rows(mesh: Mesh, batch_size: int) -> range:
    """Return the rows of the global batch that this process reads: those of its devices."""
    sharding = NamedSharding(mesh, spec("B", ACTIVATIONS, mesh))
    held = sharding.addressable_devices_indices_map((batch_size,))
    bounds = sorted({(rows.start or 0, rows.stop or batch_size) for (rows,) in held.values()})
    for (_, stop), (start, _) in itertools.pairwise(bounds):
        assert stop == start, f"one process holds rows that are not adjacent: {bounds}"
    return range(bounds[0][0], bounds[-1][1])


def put_batch(rows: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make global (B, T) arrays from this process's rows; the copy does not block."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in rows.items()}
