"""What every compiled step has in common: one `jax.shard_map` over all mesh axes, exact float32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llamajax.models.llama import Compute, Llama
from llamajax.ops.attention import NEEDS_UNCHECKED
from llamajax.sharding import ACTIVATIONS, spec, specs


def sharded(function: Callable, mesh: Mesh, model: Llama, out: Any, compute: Compute) -> Callable:
    """`function(model, batch)` on every device's part, with hand-written collectives.

    `out` holds the PartitionSpecs of what it returns.
    """
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(specs(model, mesh), spec("BT", ACTIVATIONS, mesh)),
        out_specs=out,
        check_vma=compute.attention not in NEEDS_UNCHECKED,
    )


def precision(compute: Compute) -> Any:
    """float32 means float32: TPUs and GPUs would otherwise multiply in bfloat16 or TF32."""
    exact = compute.dtype == jnp.float32
    return jax.default_matmul_precision("highest" if exact else "default")
