"""The work of `evaluate`: open, check and load, then score and write."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamajax import backends, sharding
from llamajax.config.flags import mesh_config
from llamajax.errors import UserError
from llamajax.evaluation.evaluate_options import EvaluateOptions
from llamajax.evaluation.row_sources import RowSource, open_rows
from llamajax.evaluation.scoring import Score, rows_a_batch, score
from llamajax.files import replaced_file
from llamajax.formats.load_model import load_model
from llamajax.formats.weights import open_weights
from llamajax.models.llama import Compute
from llamajax.monitoring import Progress
from llamajax.ops.attention import best_attention

# Tokens whose logits exist at one time on a device; changes memory only.
_CHUNK_TOKENS = 512


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Score the rows and return the result as the verb prints it; write per-token losses if asked.

    Raises UserError for what a user can fix.
    """
    weights = open_weights(options.checkpoint)
    source, model = open_rows(options, weights), weights.model
    rows = source.rows
    machine = backends.start(options.backend_config, keep_programs=True)
    devices = jax.devices()
    # weights split over all devices, or copied where their width does not divide
    axis = "fsdp" if model.hidden_size % len(devices) == 0 else "data"
    mesh = sharding.build_mesh(mesh_config(options.mesh, rest=axis), devices)
    dtype = options.dtype or backends.platform_facts(machine.platform).dtype
    attention = best_attention(machine, dtype, model.head_size, rows.seq_len)
    batch_size = rows_a_batch(rows, mesh, options.batch_size)
    sharding.check_divides(model.dims, mesh, batch=batch_size)
    stride = "" if source.stride is None else f", stride {source.stride}"
    notes = [
        f"compute  {dtype}, attention {attention.impl}",
        *(f"warning: {line}" for line in attention.warnings()),
        f"rows     {rows.num_rows} of {source.seq_len} tokens, {source.protocol}{stride}",
    ]
    loaded = load_model(weights, machine, mesh, dtype, notes=notes)
    all_batches = -(-rows.num_rows // batch_size)
    num_batches = min(all_batches, options.max_batches or all_batches)
    progress = Progress(total_steps=num_batches, start_step=0, title="evaluate")
    try:
        found = score(
            loaded,
            rows,
            mesh=mesh,
            compute=Compute(
                dtype=jnp.dtype(dtype),
                remat="none",
                attention=attention.impl,
                loss_chunk_tokens=_CHUNK_TOKENS,
            ),
            batch_size=batch_size,
            num_batches=num_batches,
            keep=options.per_token_nll is not None,
            show=progress.show,
        )
    finally:
        progress.close()
    if found.per_token is not None:
        out, label = Path(options.per_token_nll), f"--per_token_nll={options.per_token_nll}"
        with replaced_file(out, label=label) as hidden, hidden.open("wb") as file:
            np.save(file, found.per_token.reshape(source.shape or (1, -1)))
    return _result(source, found, complete=num_batches == all_batches) | {
        "platform": machine.platform,
        "num_devices": machine.num_devices,
        "checkpoint": str(weights.path),
        "step": weights.step,
        "dtype": dtype,
        "attention": attention.impl,
        "attention_reason": attention.reason,
    }


def _result(source: RowSource, found: Score, *, complete: bool) -> dict[str, Any]:
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
