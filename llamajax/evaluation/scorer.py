"""A loaded model that scores rows, and what a result says of how it was computed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llamajax import backends, sharding
from llamajax.config.flags import mesh_config
from llamajax.errors import say
from llamajax.evaluation.evaluate_options import EvaluateOptions
from llamajax.evaluation.scoring import Score, rows_a_batch, score, token_scores
from llamajax.formats.load_model import load_model
from llamajax.formats.weights import Weights
from llamajax.models.llama import Compute, Llama
from llamajax.monitoring import Progress
from llamajax.ops.attention import AttentionChoice, best_attention

# Tokens whose logits exist at one time on a device; changes memory only.
_CHUNK_TOKENS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer:
    """A loaded model, and how it is computed."""

    options: EvaluateOptions
    machine: backends.Machine
    mesh: Mesh
    dtype: str
    model: Llama

    @classmethod
    def load(cls, options: EvaluateOptions, weights: Weights) -> "Scorer":
        """Start the machine and load the weights. Raises UserError for what a user can fix."""
        machine = backends.start(options.backend_config, keep_programs=True)
        devices = jax.devices()
        # weights split over all devices, or copied where their width does not divide
        axis = "fsdp" if weights.model.hidden_size % len(devices) == 0 else "data"
        mesh = sharding.build_mesh(mesh_config(options.mesh, rest=axis), devices)
        sharding.check_divides(weights.model.dims, mesh, batch=sharding.batch_shards(mesh))
        dtype = options.dtype or backends.platform_facts(machine.platform).dtype
        model = load_model(weights, machine, mesh, dtype, notes=())
        return cls(options=options, machine=machine, mesh=mesh, dtype=dtype, model=model)

    def attention(self, seq_len: int) -> AttentionChoice:
        """Return the attention for rows of this length."""
        return best_attention(self.machine, self.dtype, self.model.config.head_size, seq_len)

    def score(self, rows: Any, *, keep: bool) -> Score:
        """Score the batches of `rows` that the flags ask for. keep: the scores of every token."""
        attention = self.attention(rows.seq_len)
        say(f"compute  {self.dtype}, attention {attention.impl}")
        for line in attention.warnings():
            say(f"warning: {line}")
        batch_size = rows_a_batch(rows, self.mesh, self.options.batch_size)
        num_batches = -(-rows.num_rows // batch_size)
        num_batches = min(num_batches, self.options.max_batches or num_batches)
        mode = "auto" if self.machine.is_primary else "none"
        progress = Progress(total_steps=num_batches, start_step=0, mode=mode, title="evaluate")
        compute = Compute(
            dtype=jnp.dtype(self.dtype),
            remat="none",
            attention=attention.impl,
            loss_chunk_tokens=_CHUNK_TOKENS,
        )
        try:
            return score(
                self.model,
                rows,
                mesh=self.mesh,
                run=token_scores(compute, self.mesh),
                batch_size=batch_size,
                num_batches=num_batches,
                keep=keep,
                show=progress.show,
            )
        finally:
            progress.close()

    def facts(self, weights: Weights, seq_len: int) -> dict[str, Any]:
        """Return what the result says of the machine, the weights and the computation."""
        attention = self.attention(seq_len)
        return {
            "platform": self.machine.platform,
            "num_devices": self.machine.num_devices,
            "checkpoint": str(weights.path),
            "step": weights.step,
            "dtype": self.dtype,
            "attention": attention.impl,
            "attention_reason": attention.reason,
        }
