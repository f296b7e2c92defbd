"""The cache of keys and values, and the shapes that decoding programs are compiled for.

Prompts are padded on the right to a common number of slots. The tokens that follow go into the
slots after those, the same slot for all rows. A slot is therefore no position: keys are rotated by
the positions of their own row before they are stored, and `visible_slots` leaves out the padding.
"""

import jax
import jax.numpy as jnp
from flax import struct

LETTERS = "LBKSH"

LEAST_SLOTS = 16  # below this, padding costs less than one more program


@struct.dataclass
class KVCache:
    """Rotated keys and values of all layers, (L, B, K, S, H) each."""

    k_LBKSH: jax.Array
    v_LBKSH: jax.Array


def write_cache(
    cache: KVCache, k_BTKH: jax.Array, v_BTKH: jax.Array, *, layer: jax.Array, slot: jax.Array
) -> KVCache:
    """Write T tokens of a layer into the slots from `slot` on, the same for all rows."""

    def write(all_LBKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        new_LBKSH = jnp.swapaxes(new_BTKH, 1, 2)[None].astype(all_LBKSH.dtype)
        return jax.lax.dynamic_update_slice(all_LBKSH, new_LBKSH, (layer, 0, 0, slot, 0))

    return KVCache(k_LBKSH=write(cache.k_LBKSH, k_BTKH), v_LBKSH=write(cache.v_LBKSH, v_BTKH))


def read_layer(cache: KVCache, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Read the keys and values (B, K, S, H) of one layer."""
    k_BKSH = jax.lax.dynamic_index_in_dim(cache.k_LBKSH, layer, keepdims=False)
    return k_BKSH, jax.lax.dynamic_index_in_dim(cache.v_LBKSH, layer, keepdims=False)


def visible_slots(
    prompt_lengths_B: jax.Array, *, prompt_slots: jax.Array, slot: jax.Array, slots: int
) -> jax.Array:
    """Slots (B, S) that the token in `slot` may see: its row's prompt, new tokens, and itself."""
    s = jnp.arange(slots, dtype=jnp.int32)
    is_new = (s >= prompt_slots) & (s <= slot)
    return (s[None, :] < prompt_lengths_B[:, None]) | is_new[None, :]


def bucket(count: int, *, least: int = 1) -> int:
    """The smallest power of two that is at least `count` and `least`."""
    return max(least, 1 << max(count - 1, 0).bit_length())


def prompt_slots(longest: int, *, max_seq_len: int) -> int:
    """Slots for prompts of up to `longest` tokens: a power of two, or the whole context."""
    context = -(-max_seq_len // 128) * 128  # fused kernels need multiples of 128
    return min(bucket(longest, least=LEAST_SLOTS), context)
