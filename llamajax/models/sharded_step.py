"""The one wrapper around `jax.shard_map` that every compiled step of a model uses."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llamajax.models.llama import Batch, Compute, Llama
from llamajax.models.pipeline import num_stages
from llamajax.ops.attention import needs_unchecked
from llamajax.ops.attention_kernels import kernel_has_room
from llamajax.sharding import TOKEN_AXES, specs
from llamajax.sharding.collectives import pcast_varying, psum


def by_documents(
    run: Callable[[Compute], Any], batch: Batch, compute: Compute, *, rows: int | None = None
) -> Any:
    """Return `run(compute)`, with `split` attention where documents are too many for the kernel.

    rows: that pass through a layer at a time; None: all. To be called in a `sharded_step`, by all
    devices alike, and to be differentiated inside `run`. It decides once for a batch: a branch in
    each layer would copy its condition to the host each time, and compile in minutes.
    """
    if compute.attention != "cudnn" or "segment_ids" not in batch:
        return run(compute)
    ids_BS = batch["segment_ids"]
    if num_stages() > 1:
        rows = compute.pipeline.microbatch_size
    overflows = ~kernel_has_room(ids_BS, rows=rows or ids_BS.shape[0])
    overflows = psum(pcast_varying(overflows.astype(jnp.int32), TOKEN_AXES), TOKEN_AXES)
    plain = dataclasses.replace(compute, attention="split")
    return jax.lax.cond(overflows == 0, lambda: run(compute), lambda: run(plain))


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
        check_vma=not needs_unchecked(compute.attention),
    )
