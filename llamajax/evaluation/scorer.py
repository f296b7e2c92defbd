"""Scoring of rows by a loaded model as the flags say, and what a result says of how."""

from typing import Any

import jax.numpy as jnp

from llamajax.config import MeshConfig, ModelConfig
from llamajax.errors import say
from llamajax.evaluation.evaluate_options import EvaluateOptions
from llamajax.evaluation.scoring import Score, rows_a_batch, score, token_scores
from llamajax.formats.load_model import LoadedModel, load_model
from llamajax.formats.weights import Weights
from llamajax.models.llama import Compute
from llamajax.monitoring import Progress

# Tokens whose logits exist at one time on a device; changes memory only.
_CHUNK_TOKENS = 512


def load_for_scoring(options: EvaluateOptions, weights: Weights) -> LoadedModel:
    """Load the weights to score with, split over all devices. Raises UserError."""
    return load_model(weights, options, default_mesh=_default_mesh)


def _default_mesh(model: ModelConfig, num_devices: int) -> MeshConfig:
    """Split weights over all devices, or copy them where their width does not divide."""
    if model.hidden_size % num_devices == 0:
        return MeshConfig(fsdp=num_devices)
    return MeshConfig(data=num_devices)


def score_rows(loaded: LoadedModel, rows: Any, options: EvaluateOptions, *, keep: bool) -> Score:
    """Score the batches of `rows` that the flags ask for. keep: the scores of every token."""
    attention = loaded.attention(rows.seq_len)
    say(f"compute  {loaded.dtype}, attention {attention.impl}")
    for line in attention.warnings():
        say(f"warning: {line}")
    batch_size = rows_a_batch(rows, loaded.mesh, options.batch_size)
    num_batches = -(-rows.num_rows // batch_size)
    num_batches = min(num_batches, options.max_batches or num_batches)
    mode = "auto" if loaded.machine.is_primary else "none"
    progress = Progress(total_steps=num_batches, start_step=0, mode=mode, title="evaluate")
    compute = Compute(
        dtype=jnp.dtype(loaded.dtype),
        remat="none",
        attention=attention.impl,
        loss_chunk_tokens=_CHUNK_TOKENS,
    )
    try:
        return score(
            loaded.model,
            rows,
            mesh=loaded.mesh,
            run=token_scores(compute, loaded.mesh),
            batch_size=batch_size,
            num_batches=num_batches,
            keep=keep,
            show=progress.show,
        )
    finally:
        progress.close()


def result_facts(loaded: LoadedModel, weights: Weights, seq_len: int) -> dict[str, Any]:
    """Return what the result says of the machine, the weights and the computation."""
    attention = loaded.attention(seq_len)
    return {
        "platform": loaded.machine.platform,
        "num_devices": loaded.machine.num_devices,
        "checkpoint": str(weights.path),
        "step": weights.step,
        "dtype": loaded.dtype,
        "attention": attention.impl,
        "attention_reason": attention.reason,
    }
