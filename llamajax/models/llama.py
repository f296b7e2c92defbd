"""Llama 2 and 3 as frozen pytrees: Flax NNX modules that hold weights and nothing mutable.

Arrays here are one device's part when the model runs inside the sharded step, and whole arrays when
it is called on one device; the code is the same. Weights are stored in float32 and split over
`fsdp`; `gather` at the top of the scanned block brings one layer's into use.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llamajax.config.schema import ModelConfig
from llamajax.models.lora import fold_in, project
from llamajax.models.remat import rematerialised
from llamajax.models.weights import named_key, normal, ones
from llamajax.ops.attention import attention
from llamajax.ops.cross_entropy import LossTerms, cross_entropy, token_nll
from llamajax.ops.embedding import embed
from llamajax.ops.linear import linear
from llamajax.ops.norm import rms_norm
from llamajax.ops.rope import angles, frequencies, rotate
from llamajax.sharding.collectives import all_gathered, enter_tensor, gather, leave_tensor

Batch = Mapping[str, jax.Array]

# From q (B, T, N, H), k and v (B, T, K, H) of a block's tokens, what is kept between calls (a cache
# or None) and the block's number: the attended values (B, T, N, H), and what is kept from now on.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any, jax.Array], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How a model is computed; never changes what is computed beyond rounding."""

    dtype: jnp.dtype
    remat: str
    attention: str
    loss_chunk_tokens: int
    z_weight: float = 0.0


class Attention(nnx.Module):
    """Causal self-attention with grouped queries and rotary positions."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.query = normal(config, "DNH", key, "query")
        self.key = normal(config, "DKH", key, "key")
        self.value = normal(config, "DKH", key, "value")
        self.out = normal(config, "NHD", key, "out")
        self.query_lora = self.key_lora = self.value_lora = self.out_lora = nnx.data(None)

    def __call__(self, x_BTD, cos_sin, attend: Callable, keys_BT) -> tuple[jax.Array, Any]:
        q_BTNH = project(x_BTD, self.query, self.query_lora, keys_BT)
        k_BTKH = project(x_BTD, self.key, self.key_lora, keys_BT)
        v_BTKH = checkpoint_name(project(x_BTD, self.value, self.value_lora, keys_BT), "qkv")
        q_BTNH = checkpoint_name(rotate(q_BTNH, cos_sin), "qkv")
        k_BTKH = checkpoint_name(rotate(k_BTKH, cos_sin), "qkv")
        o_BTNH, kept = attend(q_BTNH, k_BTKH, v_BTKH)
        return project(o_BTNH, self.out, self.out_lora, keys_BT, contract=2), kept


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.gate = normal(config, "DF", key, "gate")
        self.up = normal(config, "DF", key, "up")
        self.down = normal(config, "FD", key, "down")
        self.gate_lora = self.up_lora = self.down_lora = nnx.data(None)

    def __call__(self, x_BTD: jax.Array, keys_BT: jax.Array | None) -> jax.Array:
        gate_BTF = jax.nn.silu(project(x_BTD, self.gate, self.gate_lora, keys_BT))
        up_BTF = project(x_BTD, self.up, self.up_lora, keys_BT)
        return project(gate_BTF * up_BTF, self.down, self.down_lora, keys_BT)


class Block(nnx.Module):
    """Pre-normalised attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.attention_norm = ones(config, "D")
        self.attention = Attention(config, named_key(key, "attention"))
        self.mlp_norm = ones(config, "D")
        self.mlp = FeedForward(config, named_key(key, "mlp"))

    def __call__(self, x_BTD, cos_sin, attend: Callable, keys_BT, *, eps: float):
        h_BTD = enter_tensor(rms_norm(x_BTD, self.attention_norm[...], eps=eps))
        h_BTD, kept = self.attention(h_BTD, cos_sin, attend, keys_BT)
        x_BTD = x_BTD + leave_tensor(h_BTD)
        h_BTD = self.mlp(enter_tensor(rms_norm(x_BTD, self.mlp_norm[...], eps=eps)), keys_BT)
        return x_BTD + leave_tensor(h_BTD), kept


class Llama(nnx.Module):
    """The whole model; blocks are stacked along a leading L and scanned."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        self.embedding = normal(config, "VD", key, "embedding")
        keys = jax.random.split(named_key(key, "blocks"), config.num_layers)
        self.blocks = jax.vmap(lambda k: Block(config, k))(keys)
        self.norm = ones(config, "D")
        self.head = None if config.tie_embeddings else normal(config, "VD", key, "head")

    def hidden(self, batch: Batch, compute: Compute) -> jax.Array:
        """Normalised last hidden states (B, T, D), in the compute dtype.

        `batch` holds int32 (B, T) `tokens`, `positions` and `segment_ids`; without the last, tokens
        see every earlier one. `dropout_keys`, one a token, if the adapters' dropout is to happen.
        """
        segment_ids_BT = batch.get("segment_ids")

        def attend(q, k, v, kept, _):
            return attention(q, k, v, impl=compute.attention, segment_ids_BT=segment_ids_BT), kept

        return self.attended(batch, compute, attend, None)[0]

    def attended(self, batch: Batch, compute: Compute, attend: Attend, cache: Any):
        """`hidden` with the attention that the caller defines, and the cache as it left it."""
        c = self.config
        frequency = frequencies(c.head_size, theta=c.rope_theta, scaling=c.rope_scaling)
        cos_sin = angles(batch["positions"], frequency)

        def block(carry: tuple[jax.Array, Any], numbered: tuple[Block, jax.Array]):
            (x_BTD, cache), number = carry, numbered[1]
            layer, keys_BT = gather(numbered[0], compute.dtype), batch.get("dropout_keys")
            own = lambda q, k, v: attend(q, k, v, cache, number)  # noqa: E731
            return layer(x_BTD, cos_sin, own, fold_in(keys_BT, number), eps=c.norm_eps), None

        x_BTD = embed(self.embedding[...], batch["tokens"], compute.dtype)
        numbered = (self.blocks, jnp.arange(c.num_layers))
        carry = (x_BTD, cache)
        (x_BTD, cache), _ = jax.lax.scan(rematerialised(block, compute.remat), carry, numbered)
        return rms_norm(x_BTD, gather(self.norm, compute.dtype)[...], eps=c.norm_eps), cache

    def loss_terms(self, batch: Batch, compute: Compute) -> LossTerms:
        """Summed losses over the batch's `targets` where its `loss_mask` is true."""
        return cross_entropy(
            self.hidden(batch, compute),
            self._head()[...],
            batch["targets"],
            batch["loss_mask"],
            vocab_size=self.config.vocab_size,
            chunk_tokens=compute.loss_chunk_tokens,
            z_weight=compute.z_weight,
        )

    def token_nll(self, batch: Batch, compute: Compute) -> jax.Array:
        """Negative log-likelihood of each of the batch's `targets`, nats, float32 (B, T)."""
        return token_nll(
            self.hidden(batch, compute),
            self._head()[...],
            batch["targets"],
            vocab_size=self.config.vocab_size,
            chunk_tokens=compute.loss_chunk_tokens,
        )

    def logits(self, batch: Batch, compute: Compute) -> jax.Array:
        """Float32 logits (B, T, V) of every token; for tests, never for training."""
        x_BTD = self.hidden(batch, compute)
        head_VD = gather(self._head(), compute.dtype)[...]
        logits_BTV = linear(x_BTD, head_VD.T).astype(jnp.float32)
        return logits_BTV[:, :, : self.config.vocab_size]

    def next_logits(self, x_BD: jax.Array, compute: Compute) -> jax.Array:
        """Float32 logits (B, V) of the tokens after those with last hidden states `x_BD`.

        The head is used where it lies, V over `tensor`; its logits are then gathered, so that
        every device has all of V.
        """
        head_VD = gather(self._head(), compute.dtype)[...]
        logits_BV = jnp.dot(x_BD, head_VD.T, preferred_element_type=jnp.float32)
        return all_gathered(logits_BV, "tensor", dim=1)[:, : self.config.vocab_size]

    def _head(self) -> nnx.Param:
        return self.embedding if self.head is None else self.head


def plain_batch(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of (B, T + 1) tokens without packing: each row one document, every target counts."""
    inputs, targets = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
    positions = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    return {
        "tokens": inputs,
        "targets": targets,
        "positions": np.ascontiguousarray(positions),
        "segment_ids": np.ones_like(inputs),
        "loss_mask": np.ones(inputs.shape, bool),
    }
