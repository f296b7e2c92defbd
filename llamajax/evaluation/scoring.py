"""Loss of every scored token of some rows, on any mesh, summed in float64 on the host."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamajax import sharding
from llamajax.models.llama import Batch, Compute, Llama
from llamajax.models.sharded_step import by_documents, sharded_step
from llamajax.ops.cross_entropy import TokenScores
from llamajax.sharding.collectives import pcast_varying_tree

# Of one device, where the user names no batch size: enough to keep it busy, and little memory.
_TOKENS_A_DEVICE = 8192


class Score(NamedTuple):
    """Sums over the scored tokens, and the scores of each one in order, if they were kept."""

    num_rows: int
    nll: float  # nats
    tokens: int
    per_token: np.ndarray | None  # float32 (tokens,)
    greedy: np.ndarray | None  # bool (tokens,): whether no token is more probable


def token_scores(compute: Compute, mesh: Mesh) -> Callable[[Llama, Batch], TokenScores]:
    """Return the jitted scores of each target of a batch (B, T), whole on each device."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def local(model: Llama, batch: Batch) -> TokenScores:
        model = pcast_varying_tree(model)
        return by_documents(lambda compute: model.token_scores(batch, compute), batch, compute)

    def step(model: Llama, batch: Batch) -> TokenScores:
        tokens = sharding.batch_spec(mesh)
        found = sharded_step(local, mesh, model, (tokens,), tokens, compute)(model, batch)
        return jax.tree.map(lambda x_BT: jax.sharding.reshard(x_BT, everywhere), found)

    return jax.jit(step)


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats: inf where float64 ends, NaN of NaN."""
    return math.inf if loss > 700 else math.exp(loss)


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
    run: Callable[[Llama, Batch], TokenScores],
    batch_size: int,
    num_batches: int,
    keep: bool,
    show: Callable[[dict], None],
) -> Score:
    """Score the first `num_batches` batches of `batch_size` rows; the last is filled with padding.

    rows: `PackedRows` or `ContinuationRows`. run: made by `token_scores`. keep:
    whether to keep the scores of every token. show: called with a row of metrics a batch. A batch
    is read while the one before it is computed.
    """
    local = sharding.local_rows(mesh, batch_size)
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    nll, tokens, start_s = 0.0, 0, time.monotonic()
    pending: tuple[TokenScores, np.ndarray] | None = None
    for number in range(num_batches + 1):
        current = None
        if number < num_batches:
            batch = rows.batch(range(number * batch_size, (number + 1) * batch_size))
            mask = batch.pop("loss_mask")
            here = {name: array[local.start : local.stop] for name, array in batch.items()}
            current = run(model, sharding.put_batch(here, mesh)), mask
        if pending is not None:
            scored, greedy = (np.asarray(x)[pending[1]] for x in pending[0])
            kept += [(scored, greedy)] if keep else []
            nll += float(scored.sum(dtype=np.float64))
            tokens += len(scored)
            seconds = time.monotonic() - start_s
            row = {"step": number, "loss": nll / max(1, tokens), "tokens_per_s": tokens / seconds}
            show(row | {"step_time_s": seconds / number})
        pending = current
    per_token = (
        [np.concatenate(parts) for parts in zip(*kept, strict=True)] if keep else (None,) * 2
    )
    return Score(min(num_batches * batch_size, rows.num_rows), nll, tokens, *per_token)
