"""Meshes over the first devices, and functions mapped over one."""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamajax.config.schema import MeshConfig
from llamajax.sharding import ACTIVATIONS, WEIGHTS, build_mesh, spec


def mesh_of(**sizes: int) -> Mesh:
    """A mesh of these axes over as many devices as they need."""
    return build_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])


def on_mesh(sizes: dict[str, int], function, arrays, outputs, *, check_vma: bool = True):
    """`function` of every device's part of `arrays`, in `jax.shard_map`, as NumPy arrays.

    arrays: pairs of dimension letters and array; "VD" is a weight. outputs: letters of each, ""
    for a scalar.
    """
    mesh = mesh_of(**sizes)

    def of(letters: str) -> PartitionSpec:
        return spec(letters, WEIGHTS if letters == "VD" else ACTIVATIONS, mesh)

    names, values = zip(*arrays, strict=True)
    run = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(map(of, names)),
        out_specs=tuple(map(of, outputs)),
        check_vma=check_vma,
    )
    placed = [
        jax.device_put(value, NamedSharding(mesh, of(name)))
        for name, value in zip(names, values, strict=True)
    ]
    return [np.asarray(array) for array in jax.jit(run)(*placed)]
