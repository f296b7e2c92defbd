"""Sharding: the mesh, the two axis maps, what crosses devices, and shardings of whole trees."""

from llamajax.sharding.axes import ACTIVATIONS, AXES, BATCH_AXES, TOKEN_AXES, WEIGHTS, axes_of, spec
from llamajax.sharding.batch import batch_sharding, local_rows, place
from llamajax.sharding.device_order import check_slices, node_numbers, node_of
from llamajax.sharding.device_order import table as placement_table
from llamajax.sharding.fit import check_divides
from llamajax.sharding.mesh import axis_sizes, batch_shards, build_mesh, describe
from llamajax.sharding.tree import (
    at_rest,
    is_stacked,
    is_weight,
    letters,
    map_weights,
    shardings,
    specs,
)

__all__ = [
    "ACTIVATIONS",
    "AXES",
    "BATCH_AXES",
    "TOKEN_AXES",
    "WEIGHTS",
    "at_rest",
    "axes_of",
    "axis_sizes",
    "batch_sharding",
    "batch_shards",
    "build_mesh",
    "check_divides",
    "check_slices",
    "describe",
    "is_stacked",
    "is_weight",
    "letters",
    "local_rows",
    "map_weights",
    "node_numbers",
    "node_of",
    "place",
    "placement_table",
    "shardings",
    "spec",
    "specs",
]
