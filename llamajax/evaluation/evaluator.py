"""One evaluation: what is checked, loaded, scored and written, in that order."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llamajax import backends, sharding
from llamajax.config.flags import mesh_config
from llamajax.errors import UserError, say
from llamajax.evaluation.evaluate_options import EvaluateOptions, check_options
from llamajax.evaluation.row_sources import Source, open_source
from llamajax.evaluation.scoring import Score, rows_a_batch, score
from llamajax.files import replaced_file
from llamajax.formats.weights import Weights, open_weights
from llamajax.models.abstract import abstract_model
from llamajax.models.counts import num_parameters
from llamajax.models.llama import Compute
from llamajax.monitoring import Progress
from llamajax.monitoring.progress import format_count
from llamajax.ops.attention import first_supported

# Tokens whose logits exist at one time on a device; changes memory only.
_CHUNK_TOKENS = 512


def evaluate(request: EvaluateOptions) -> dict[str, Any]:
    """The result as the verb prints it; writes the losses of the tokens if asked. UserError."""
    check_options(request)
    weights = open_weights(request.checkpoint)
    source = open_source(request, weights)
    machine = backends.start(request.backend, keep_programs=True)
    mesh = _mesh(request, weights)
    dtype = request.dtype or backends.platform_facts(machine.platform).dtype
    compute = _compute(weights, source, machine, dtype)
    batch_size = rows_a_batch(source.rows, mesh, request.batch_size)
    sharding.check_divides(weights.model.dims, mesh, batch=batch_size, accumulation=1)
    _greet(weights, source, machine, mesh, compute)
    model = weights.load(abstract_model(weights.model, mesh, dtype=jnp.dtype(dtype)))
    whole = -(-source.rows.num_rows // batch_size)
    num_batches = min(whole, request.max_batches or whole)
    progress = Progress(total_steps=num_batches, start_step=0, mode="auto", primary=True)
    try:
        found = score(
            model,
            source.rows,
            mesh=mesh,
            compute=compute,
            batch_size=batch_size,
            num_batches=num_batches,
            keep=request.per_token_nll is not None,
            show=progress.show,
        )
    finally:
        progress.close()
    if found.per_token is not None:
        _write(Path(request.per_token_nll), found.per_token.reshape(source.shape or (1, -1)))
    facts = {
        "platform": machine.platform,
        "num_devices": machine.num_devices,
        "checkpoint": str(weights.path),
        "step": weights.step,
        "dtype": dtype,
    }
    return _result(source, found, complete=num_batches == whole) | facts


def _mesh(request: EvaluateOptions, weights: Weights) -> Mesh:
    """The mesh asked for; else the weights in shards over all devices, or copied where their width
    does not divide."""
    devices = jax.devices()
    divides = weights.model.hidden_size % len(devices) == 0
    config = mesh_config(request.mesh, rest="fsdp" if divides else "data")
    return sharding.build_mesh(config, devices)


def _compute(weights: Weights, source: Source, machine: backends.Machine, dtype: str) -> Compute:
    impl = first_supported(
        machine.attention_preferences,
        platform=machine.platform,
        compute_capability=machine.compute_capability,
        dtype=dtype,
        head_size=weights.model.head_size,
        seq_len=source.rows.seq_len,
    )
    return Compute(
        dtype=jnp.dtype(dtype), remat="none", attention=impl, loss_chunk_tokens=_CHUNK_TOKENS
    )


def _greet(
    weights: Weights, source: Source, machine: backends.Machine, mesh: Mesh, compute: Compute
) -> None:
    step = "" if weights.step is None else f" of step {weights.step}"
    stride = "" if source.stride is None else f", stride {source.stride}"
    for line in (
        f"weights  {weights.path} ({weights.kind}{step}), "
        f"{format_count(num_parameters(weights.model))} parameters",
        f"machine  {machine.platform}, {machine.device_kind}; mesh {sharding.describe(mesh)}",
        f"compute  {compute.dtype.name}, attention {compute.attention}",
        f"rows     {source.rows.num_rows} of {source.seq_len} tokens, {source.protocol}{stride}",
    ):
        say(line)


def _result(source: Source, found: Score, *, complete: bool) -> dict[str, Any]:
    """Loss and what follows from it; bits per byte only where all of the text was scored."""
    if not found.tokens:
        raise UserError("none of the tokens read is a target: raise --max_batches")
    loss = found.nll / found.tokens
    num_bytes = source.num_bytes if complete else None
    return {
        "loss": loss,
        "perplexity": math.inf if loss > 700 else math.exp(loss),
        "bits_per_byte": num_bytes and found.nll / math.log(2) / num_bytes,
        "tokens": found.tokens,
        "bytes": num_bytes,
        "protocol": source.protocol,
        "seq_len": source.seq_len,
        "stride": source.stride,
    }


def _write(path: Path, array: np.ndarray) -> None:
    with replaced_file(path, label=f"--per_token_nll={path}") as hidden, hidden.open("wb") as file:
        np.save(file, array)
