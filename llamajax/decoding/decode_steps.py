"""The two compiled programs of decoding: prompts into the cache, and new tokens one by one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from llamajax.decoding import kv_cache as kv
from llamajax.decoding.generate_options import Sampling
from llamajax.decoding.sampling import sample
from llamajax.models.llama import Block, Compute, LayerInputs, Llama
from llamajax.models.sharded_step import sharded_step
from llamajax.ops.attention import plain_attention
from llamajax.sharding import ACTIVATIONS, BATCH_AXES, batch_spec, collectives, spec

NOTHING = -1  # in the output of a row that had stopped before


@struct.dataclass
class Rows:
    """Everything about a batch between two programs; B rows, `count` new tokens so far."""

    cache: kv.KVCache
    lengths_B: jax.Array  # int32, tokens of the prompt
    numbers_B: jax.Array  # int32, number of the prompt: the random bits depend on it
    tokens_B: jax.Array  # int32, the newest token, not in the cache yet
    running_B: jax.Array  # bool, whether no stop token came
    seen_BV: jax.Array | None  # bool, tokens of prompt and output; for the repetition penalty
    count: jax.Array  # int32 scalar
    prompt_slots: jax.Array  # int32 scalar


def rows_specs(mesh: Mesh, sampling: Sampling) -> Rows:
    """PartitionSpecs of `Rows`."""
    cache, rows = spec(kv.LETTERS, ACTIVATIONS, mesh), spec("B", ACTIVATIONS, mesh)
    return Rows(
        cache=kv.KVCache(k_LBKSH=cache, v_LBKSH=cache),
        lengths_B=rows,
        numbers_B=rows,
        tokens_B=rows,
        running_B=rows,
        seen_BV=PartitionSpec(*rows, None) if sampling.penalizes else None,
        count=PartitionSpec(),
        prompt_slots=PartitionSpec(),
    )


def prefill(
    mesh: Mesh,
    model: Llama,
    compute: Compute,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    *,
    slots: int,
) -> Callable[..., tuple[Rows, jax.Array]]:
    """Jitted (model, tokens (B, T), lengths, numbers, running (B,), seed) -> rows, tokens (B,).

    `tokens` holds prompts padded on the right; `running` is false for rows that are no prompt. The
    cache has `slots` slots. The tokens returned are the first new one of each row.
    """

    def local(model: Llama, tokens_BT, lengths_B, numbers_B, running_B, seed):
        cache, logits_BV = fill_cache(model, tokens_BT, lengths_B, compute, slots=slots)
        rows = Rows(
            cache=cache,
            lengths_B=lengths_B,
            numbers_B=numbers_B,
            tokens_B=lengths_B,  # replaced by the first new token
            running_B=running_B,
            seen_BV=_seen(tokens_BT, lengths_B, logits_BV.shape[1]) if sampling.penalizes else None,
            count=jnp.int32(0),
            prompt_slots=jnp.int32(tokens_BT.shape[1]),
        )
        return _next_token(rows, logits_BV, sampling, stop_ids, seed)

    per_row = spec("B", ACTIVATIONS, mesh)
    inputs = (batch_spec(mesh), per_row, per_row, per_row, PartitionSpec())
    outputs = (rows_specs(mesh, sampling), per_row)
    return jax.jit(sharded_step(local, mesh, model, inputs, outputs, compute))


def decode(
    mesh: Mesh,
    model: Llama,
    compute: Compute,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    *,
    chunk: int,
) -> Callable[..., tuple[Rows, jax.Array]]:
    """Jitted (model, rows, seed, steps) -> rows, tokens (B, chunk); rows are donated.

    Appends up to `steps` <= `chunk` tokens to each row on the device, without the host in between,
    and ends early when every row has stopped. The rest of `tokens` is NOTHING.
    """

    def num_running(rows: Rows) -> jax.Array:
        return collectives.psum(jnp.sum(rows.running_B, dtype=jnp.int32), BATCH_AXES)

    def local(model: Llama, rows: Rows, seed, steps):
        def is_left(carry):
            _, _, n, running = carry
            return (n < steps) & (running > 0)

        def step(carry):
            rows, tokens_BC, n, _ = carry
            cache, logits_BV = append_token(model, rows, compute)
            rows = rows.replace(cache=cache)
            rows, new_B = _next_token(rows, logits_BV, sampling, stop_ids, seed)
            tokens_BC = jax.lax.dynamic_update_slice(tokens_BC, new_B[:, None], (0, n))
            return rows, tokens_BC, n + 1, num_running(rows)

        nothing_BC = jnp.full((rows.tokens_B.size, chunk), NOTHING, jnp.int32)
        nothing_BC = collectives.pcast_varying_like(nothing_BC, rows.tokens_B)
        carry = (rows, nothing_BC, jnp.int32(0), num_running(rows))
        return jax.lax.while_loop(is_left, step, carry)[:2]

    rows = rows_specs(mesh, sampling)
    inputs = (rows, PartitionSpec(), PartitionSpec())
    outputs = (rows, PartitionSpec(*rows.tokens_B, None))
    return jax.jit(sharded_step(local, mesh, model, inputs, outputs, compute), donate_argnums=1)


def fill_cache(
    model: Llama, tokens_BT: jax.Array, lengths_B: jax.Array, compute: Compute, *, slots: int
) -> tuple[kv.KVCache, jax.Array]:
    """Return a cache of `slots` slots with these prompts in it, and the logits (B, V) after."""
    c, (B, T) = model.config, tokens_BT.shape
    kv_heads = model.blocks.attention.key.get_value().shape[2]  # of this device
    zeros = jnp.zeros((c.num_layers, B, kv_heads, slots, c.head_size), compute.dtype)
    zeros = collectives.pcast_varying(zeros, ("data", "fsdp", "tensor"))

    def visit(block: Block, x_BTD, cache: kv.KVCache, inputs: LayerInputs):
        def attend(q, k, v):
            filled = kv.write_cache(cache, k, v, layer=inputs.number, slot=jnp.int32(0))
            return inputs.attend(q, k, v)[0], filled

        return *block(x_BTD, inputs, attend), None

    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    batch = {"tokens": tokens_BT, "positions": positions_BT}
    x_BTD, cache, _ = model.forward(batch, compute, visit, kv.KVCache(k_LBKSH=zeros, v_LBKSH=zeros))
    x_BD = jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
    return cache, model.next_logits(x_BD, compute)


def append_token(model: Llama, rows: Rows, compute: Compute) -> tuple[kv.KVCache, jax.Array]:
    """Return the cache with the newest token of each row in it, and the logits (B, V) after it."""
    newest = rows.count - 1  # counted from 0
    slot, slots = rows.prompt_slots + newest, rows.cache.k_LBKSH.shape[3]
    allowed_BS = kv.visible_slots(
        rows.lengths_B, prompt_slots=rows.prompt_slots, slot=slot, slots=slots
    )

    def visit(block: Block, x_BTD, cache: kv.KVCache, inputs: LayerInputs):
        def attend(q, k, v):
            longer = kv.write_cache(cache, k, v, layer=inputs.number, slot=slot)
            k, v = kv.read_layer(longer, inputs.number)
            return plain_attention(q, k, v, allowed_BS[:, None], keys="BKSH"), longer

        return *block(x_BTD, inputs, attend), None

    batch = {"tokens": rows.tokens_B[:, None], "positions": (rows.lengths_B + newest)[:, None]}
    x_BTD, cache, _ = model.forward(batch, compute, visit, rows.cache)
    return cache, model.next_logits(x_BTD[:, 0], compute)


def _next_token(
    rows: Rows, logits_BV: jax.Array, sampling: Sampling, stop_ids: tuple[int, ...], seed
) -> tuple[Rows, jax.Array]:
    """Return rows with one more token, and that token; NOTHING for rows that had stopped before."""
    tokens_B = sample(
        logits_BV,
        sampling,
        seed=seed,
        numbers_B=rows.numbers_B,
        index=rows.count,
        seen_BV=rows.seen_BV,
    )
    # the same on every device along `tensor` already; this tells JAX so
    tokens_B = collectives.pmax(tokens_B, "tensor")
    seen_BV = rows.seen_BV
    if seen_BV is not None:
        ids = jnp.arange(seen_BV.shape[1], dtype=jnp.int32)
        seen_BV |= tokens_B[:, None] == ids[None, :]
    stops_B = jnp.isin(tokens_B, jnp.array(stop_ids, jnp.int32))
    new_B = jnp.where(rows.running_B, tokens_B, NOTHING)
    running_B, count = rows.running_B & ~stops_B, rows.count + 1
    return rows.replace(tokens_B=tokens_B, running_B=running_B, seen_BV=seen_BV, count=count), new_B


def _seen(tokens_BT: jax.Array, lengths_B: jax.Array, size: int) -> jax.Array:
    """Which of `size` tokens are in each prompt, bool (B, V)."""
    B, T = tokens_BT.shape
    is_prompt_BT = jnp.arange(T, dtype=jnp.int32)[None, :] < lengths_B[:, None]
    ids_BT = jnp.where(is_prompt_BT, tokens_BT, size)  # beyond the last: dropped
    seen_BV = collectives.pcast_varying_like(jnp.zeros((B, size), bool), tokens_BT)
    return seen_BV.at[jnp.arange(B)[:, None], ids_BT].set(True, mode="drop")
