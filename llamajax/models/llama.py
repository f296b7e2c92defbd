"""Llama 2 and 3 as frozen pytrees: Flax NNX modules that hold weights and nothing mutable.

Arrays here are one device's part when the model runs inside the sharded step, and whole arrays when
it is called on one device; the code is the same. Weights are stored in float32 and split over
`fsdp`; `gather` at the top of the scanned block brings one layer's into use.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llamajax.config.schema import ModelConfig
from llamajax.models.remat import rematerialised
from llamajax.models.weights import named_key, normal, ones
from llamajax.ops.attention import attention
from llamajax.ops.cross_entropy import LossTerms, cross_entropy, token_nll
from llamajax.ops.embedding import embed
from llamajax.ops.linear import linear
from llamajax.ops.norm import rms_norm
from llamajax.ops.rope import angles, frequencies, rotate
from llamajax.sharding.collectives import enter_tensor, gather, leave_tensor

Batch = Mapping[str, jax.Array]


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

    def __call__(self, x_BTD, cos_sin, segment_ids_BT, *, impl: str) -> jax.Array:
        q_BTNH = checkpoint_name(rotate(linear(x_BTD, self.query[...]), cos_sin), "qkv")
        k_BTKH = checkpoint_name(rotate(linear(x_BTD, self.key[...]), cos_sin), "qkv")
        v_BTKH = checkpoint_name(linear(x_BTD, self.value[...]), "qkv")
        o_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, impl=impl, segment_ids_BT=segment_ids_BT)
        return linear(o_BTNH, self.out[...], contract=2)


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.gate = normal(config, "DF", key, "gate")
        self.up = normal(config, "DF", key, "up")
        self.down = normal(config, "FD", key, "down")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = jax.nn.silu(linear(x_BTD, self.gate[...]))
        return linear(gate_BTF * linear(x_BTD, self.up[...]), self.down[...])


class Block(nnx.Module):
    """Pre-normalised attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.attention_norm = ones(config, "D")
        self.attention = Attention(config, named_key(key, "attention"))
        self.mlp_norm = ones(config, "D")
        self.mlp = FeedForward(config, named_key(key, "mlp"))

    def __call__(self, x_BTD, cos_sin, segment_ids_BT, *, eps: float, impl: str) -> jax.Array:
        h_BTD = enter_tensor(rms_norm(x_BTD, self.attention_norm[...], eps=eps))
        h_BTD = self.attention(h_BTD, cos_sin, segment_ids_BT, impl=impl)
        x_BTD = x_BTD + leave_tensor(h_BTD)
        h_BTD = self.mlp(enter_tensor(rms_norm(x_BTD, self.mlp_norm[...], eps=eps)))
        return x_BTD + leave_tensor(h_BTD)


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
        see every earlier one.
        """
        c = self.config
        frequency = frequencies(c.head_size, theta=c.rope_theta, scaling=c.rope_scaling)
        cos_sin = angles(batch["positions"], frequency)
        segment_ids_BT = batch.get("segment_ids")

        def block(x_BTD: jax.Array, layer: Block) -> tuple[jax.Array, None]:
            layer = gather(layer, compute.dtype)
            impl = compute.attention
            return layer(x_BTD, cos_sin, segment_ids_BT, eps=c.norm_eps, impl=impl), None

        x_BTD = embed(self.embedding[...], batch["tokens"], compute.dtype)
        x_BTD, _ = jax.lax.scan(rematerialised(block, compute.remat), x_BTD, self.blocks)
        return rms_norm(x_BTD, gather(self.norm, compute.dtype)[...], eps=c.norm_eps)

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
