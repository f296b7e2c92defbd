"""From the rows that a process reads to one global array over the mesh."""

import itertools
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llamajax.sharding.axes import ACTIVATIONS, spec


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a (B, T) array of samples: whole rows; the step itself splits tokens."""
    return NamedSharding(mesh, spec("BT", ACTIVATIONS, mesh))


def local_rows(mesh: Mesh, batch_size: int) -> range:
    """Rows of the global batch that this process has to read: those its devices hold."""
    sharding = NamedSharding(mesh, spec("B", ACTIVATIONS, mesh))
    held = sharding.addressable_devices_indices_map((batch_size,))
    bounds = sorted({(rows.start or 0, rows.stop or batch_size) for (rows,) in held.values()})
    for (_, stop), (start, _) in itertools.pairwise(bounds):
        assert stop == start, f"one process holds rows that are not adjacent: {bounds}"
    return range(bounds[0][0], bounds[-1][1])


def place(rows: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global (B, T) arrays on the mesh from this process's rows; the copy does not block."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in rows.items()}
