"""Look-up of token embeddings in a table split over vocabulary (`tensor`) and width (`fsdp`)."""

import functools

import jax
import jax.numpy as jnp

from llamajax.sharding import collectives


def _rows(tokens: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Row of each token in this device's part of the vocabulary, and whether it has one."""
    row = tokens - collectives.axis_index("tensor") * num_rows
    here = (row >= 0) & (row < num_rows)
    return jnp.where(here, row, 0), here


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def embed(
    table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype, split_tokens: bool = False
) -> jax.Array:
    """Look up embeddings (B, T, D) in `dtype`; `table_VD` is this device's float32 part.

    With `split_tokens` each device along `tensor` keeps its part of T.

    The table is not gathered: tokens (small) are gathered over `fsdp`, each device looks up its
    slice of the width for all of them, and an all-to-all joins the slices of the local tokens. That
    moves B x T x D values instead of V x D, and in backward the gradient of a frequent token is
    summed in float32 without a rounding in between.
    """
    return _embed_forward(table_VD, tokens_BT, dtype, split_tokens)[0]


def _embed_forward(table_VD, tokens_BT, dtype: jnp.dtype, split_tokens: bool):
    tokens = collectives.all_gather(tokens_BT, "fsdp", dim=0)
    rows, here = _rows(tokens, table_VD.shape[0])
    x = jnp.where(here[:, :, None], table_VD[rows].astype(dtype), jnp.zeros((), dtype))
    x = collectives.all_to_all(x, "fsdp", split=0, join=2)
    if split_tokens:
        return collectives.psum_scatter(x, "tensor", dim=1), (table_VD, tokens)
    return collectives.psum(x, "tensor"), (table_VD, tokens)


def _embed_backward(dtype: jnp.dtype, split_tokens: bool, saved: tuple, grad: jax.Array):
    table_VD, tokens = saved
    if split_tokens:
        grad = collectives.all_gather(grad, "tensor", dim=1)
    rows, here = _rows(tokens, table_VD.shape[0])
    grad = collectives.all_to_all(grad, "fsdp", split=2, join=0).astype(jnp.float32)
    grad = jnp.where(here[:, :, None], grad, 0.0)
    zeros = collectives.pcast_varying_like(jnp.zeros(table_VD.shape, jnp.float32), table_VD, grad)
    return zeros.at[rows].add(grad), None


embed.defvjp(_embed_forward, _embed_backward)
