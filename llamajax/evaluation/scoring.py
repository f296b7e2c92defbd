"""Loss of every scored token of some rows, on any mesh, summed in float64 on the host."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from llamajax import sharding
from llamajax.models.llama import Batch, Compute, Llama
from llamajax.models.sharded_step import by_documents, sharded_step
from llamajax.sharding.collectives import pcast_varying

# Of one device, where the user names no batch size: enough to keep it busy, and little memory.
_TOKENS_A_DEVICE = 8192


class Score(NamedTuple):
    """Sums over the scored tokens; each one's loss in the order of the rows, if it was kept."""

    nll: float  # nats
    tokens: int
    per_token: np.ndarray | None  # float32 (tokens,)


def token_losses(compute: Compute, mesh: Mesh) -> Callable[[Llama, Batch], jax.Array]:
    """Jitted loss of each target of a batch in nats, float32 (B, T) sharded like the batch."""

    def local(model: Llama, batch: Batch) -> jax.Array:
        model = pcast_varying(model, "data")
        return by_documents(lambda compute: model.token_nll(batch, compute), batch, compute)

    def step(model: Llama, batch: Batch) -> jax.Array:
        tokens = sharding.batch_spec(mesh)
        return sharded_step(local, mesh, model, (tokens,), tokens, compute)(model, batch)

    return jax.jit(step)


def rows_a_batch(rows: Any, mesh: Mesh, batch_size: int | None) -> int:
    """Rows of every batch: as asked, or as many as there are, in whole shards of the mesh."""
    shards = sharding.batch_shards(mesh)
    wanted = batch_size or shards * max(1, _TOKENS_A_DEVICE // rows.seq_len)
    return -(-min(wanted, rows.num_rows) // shards) * shards


def score(
    model: Llama,
    rows: Any,
    *,
    mesh: Mesh,
    compute: Compute,
    batch_size: int,
    num_batches: int,
    keep: bool,
    show: Callable[[dict], None],
) -> Score:
    """Score the first `num_batches` batches of `batch_size` rows; the last is filled with padding.

    rows: `WindowRows` or `PackedRows`. keep: whether to keep the loss of every token. show: called
    with a row of metrics a batch. A batch is read while the one before it is computed.
    """
    losses = token_losses(compute, mesh)
    found: list[np.ndarray] = []
    nll, tokens, start_s = 0.0, 0, time.monotonic()
    pending: tuple[jax.Array, np.ndarray] | None = None
    for number in range(num_batches + 1):
        current = None
        if number < num_batches:
            batch = rows.batch(range(number * batch_size, (number + 1) * batch_size))
            mask = batch.pop("loss_mask")
            current = losses(model, sharding.put_batch(batch, mesh)), mask
        if pending is not None:
            scored = np.asarray(pending[0])[pending[1]]
            found += [scored] if keep else []
            nll += float(scored.sum(dtype=np.float64))
            tokens += len(scored)
            seconds = time.monotonic() - start_s
            row = {"step": number, "loss": nll / max(1, tokens), "tokens_per_s": tokens / seconds}
            show(row | {"step_time_s": seconds / number})
        pending = current
    return Score(nll, tokens, np.concatenate(found) if keep else None)
