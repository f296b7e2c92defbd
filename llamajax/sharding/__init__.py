"""The mesh, the two maps from dimensions to mesh axes, collectives, and shardings of trees."""

from llamajax.sharding.axes import (
    ACTIVATIONS,
    AXES,
    BATCH_AXES,
    TOKEN_AXES,
    WEIGHTS,
    axes_of,
    is_stacked,
    is_weight,
    letters,
    map_weights,
    same_parts,
    shardings,
    spec,
    specs,
    stored_spec,
)
from llamajax.sharding.device_order import (
    check_slices,
    device_order_table,
    node_numbers,
    node_of,
)
from llamajax.sharding.fit import check_divides
from llamajax.sharding.mesh import (
    axis_sizes,
    batch_sharding,
    batch_shards,
    batch_spec,
    build_mesh,
    describe,
    join_sequence,
    local_rows,
    put_batch,
)
