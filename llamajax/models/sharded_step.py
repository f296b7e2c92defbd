"""The one wrapper around `jax.shard_map` that every compiled step of a model uses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llamajax.models.llama import Compute, Llama
from llamajax.ops.attention import NEEDS_UNCHECKED
from llamajax.sharding import specs


def sharded_step(
    function: Callable, mesh: Mesh, model: Llama, inputs: Any, outputs: Any, compute: Compute
) -> Callable:
    """Map `function(model, *arrays)` over all mesh axes; each device gets its part of everything.

    `inputs` (a tuple, without the model) and `outputs` are PartitionSpecs. In float32 all products
    are exact: TPUs and GPUs would otherwise multiply in bfloat16 or TF32.
    """
    precision = "highest" if compute.dtype == jnp.float32 else "default"

    def local(*arrays: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return function(*arrays)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs(model, mesh), *inputs),
        out_specs=outputs,
        check_vma=compute.attention not in NEEDS_UNCHECKED,
    )
