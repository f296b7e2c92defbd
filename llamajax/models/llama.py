"""Llama 2 and 3 as frozen pytrees: Flax NNX modules that hold weights and nothing mutable.

Arrays here are one device's part when the model runs inside the sharded step, and whole arrays when
it is called on one device; the code is the same. Weights are stored in float32 and split over
`fsdp`; `gather` at the top of the scanned block brings one layer's into use. A batch comes with all
tokens of its rows; those that a device embeds, and has the loss of, are its *own*: along `sequence`
a part of each row, along `stage` every so manieth microbatch.
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
from llamajax.models.pipeline import (
    Layers,
    credited,
    gathered_once,
    num_stages,
    own_rows,
    pipelined,
)
from llamajax.models.remat import policy, rematerialised
from llamajax.models.weights import named_key, normal, ones
from llamajax.ops.attention import attention
from llamajax.ops.attention_split import own_tokens
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
    remat_keep: tuple[str, ...] = ()
    remat_offload: tuple[str, ...] = ()
    split_tokens: bool = False  # between the blocks, over `tensor`; T must divide
    microbatch_size: int = 1  # pipeline: rows of a microbatch on a device
    rounds: int = 1  # pipeline: groups of layers a stage
    remat_stage: bool = True  # pipeline: keep a stage's input alone


# What the layers see of each token, beside its activation; the other arrays of a batch are seen
# where tokens are embedded and where their loss is.
_PER_TOKEN = ("positions", "dropout_keys")


def own(x_BT: jax.Array, compute: Compute) -> jax.Array:
    """The part of a batch's array whose embedding and loss are this device's."""
    return own_rows(own_tokens(x_BT), microbatch_size=compute.microbatch_size)


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
        gate_BTF = checkpoint_name(project(x_BTD, self.gate, self.gate_lora, keys_BT), "gate")
        up_BTF = checkpoint_name(project(x_BTD, self.up, self.up_lora, keys_BT), "up")
        h_BTF = jax.nn.silu(gate_BTF) * up_BTF
        return project(h_BTF, self.down, self.down_lora, keys_BT)


class Block(nnx.Module):
    """Pre-normalised attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.attention_norm = ones(config, "D")
        self.attention = Attention(config, named_key(key, "attention"))
        self.mlp_norm = ones(config, "D")
        self.mlp = FeedForward(config, named_key(key, "mlp"))

    def __call__(self, x_BTD, cos_sin, attend: Callable, keys_BT, *, eps: float, split: bool):
        x_BTD = checkpoint_name(x_BTD, "block_input")
        h_BTD = rms_norm(x_BTD, self.attention_norm[...], eps=eps)
        h_BTD = enter_tensor(h_BTD, split_tokens=split)
        h_BTD, kept = self.attention(h_BTD, cos_sin, attend, keys_BT)
        x_BTD = x_BTD + leave_tensor(h_BTD, split_tokens=split)
        x_BTD = checkpoint_name(x_BTD, "mlp_input")
        h_BTD = rms_norm(x_BTD, self.mlp_norm[...], eps=eps)
        h_BTD = self.mlp(enter_tensor(h_BTD, split_tokens=split), keys_BT)
        return x_BTD + leave_tensor(h_BTD, split_tokens=split), kept


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
        """Normalised last hidden states (B, T, D) of the own tokens, in the compute dtype.

        `batch` holds int32 (B, T) `tokens`, `positions` and `segment_ids`; without the last, tokens
        see every earlier one. `dropout_keys`, one a token, if the adapters' dropout is to happen.
        With `split_tokens` each device along `tensor` has its part of the own tokens.
        """
        size, dtype, split = compute.microbatch_size, compute.dtype, compute.split_tokens
        columns = {k: own_tokens(v) for k, v in batch.items() if k in _PER_TOKEN}
        columns |= {k: v for k, v in batch.items() if k == "segment_ids"}
        tokens_BT = own(batch["tokens"], compute)
        x_BTD = embed(self.embedding[...], tokens_BT, dtype, split)
        if num_stages() == 1:
            bring = lambda layer: gather(layer, dtype, split_tokens=split)  # noqa: E731
            numbered = (self.blocks, jnp.arange(self.config.num_layers))
            x_BTD = self._layers(numbered, x_BTD, columns, compute, bring)
        else:
            columns = {k: v.reshape(-1, size, *v.shape[1:]) for k, v in columns.items()}

            def stage(layers: Layers, x_BTD, numbers, microbatch) -> jax.Array:
                mine = {k: v[microbatch] for k, v in columns.items()}
                return self._layers((layers, numbers), x_BTD, mine, compute, credited)

            x_BTD = pipelined(
                stage,
                gathered_once(self.blocks, dtype, split_tokens=split),
                x_BTD.reshape(-1, size, *x_BTD.shape[1:]),
                rounds=compute.rounds,
                remat_stage=compute.remat_stage,
            ).reshape(x_BTD.shape)
        return self._normed(x_BTD, compute)

    def _layers(self, numbered, x_BTD, batch: Batch, compute: Compute, bring: Callable):
        """`x` after these numbered layers, each of which sees the batch's own documents."""
        segment_ids_BT = batch.get("segment_ids")

        def attend(q, k, v, kept, _):
            return attention(q, k, v, impl=compute.attention, segment_ids_BT=segment_ids_BT), kept

        return self._scanned(numbered, (x_BTD, None), batch, compute, attend, bring)[0]

    def _scanned(self, numbered, carry, batch, compute: Compute, attend: Attend, bring: Callable):
        """(x, cache) after a stack of layers and their numbers; `bring` brings one into use."""
        c, split = self.config, compute.split_tokens
        frequency = frequencies(c.head_size, theta=c.rope_theta, scaling=c.rope_scaling)
        cos_sin, keys_BT = angles(batch["positions"], frequency), batch.get("dropout_keys")

        def block(carry: tuple[jax.Array, Any], numbered: tuple[Any, jax.Array]):
            (x_BTD, cache), (layer, number) = carry, numbered
            own = lambda q, k, v: attend(q, k, v, cache, number)  # noqa: E731
            keys = fold_in(keys_BT, number)
            return bring(layer)(x_BTD, cos_sin, own, keys, eps=c.norm_eps, split=split), None

        kept = policy(compute.remat, keep=compute.remat_keep, offload=compute.remat_offload)
        return jax.lax.scan(rematerialised(block, kept), carry, numbered)[0]

    def attended(
        self,
        batch: Batch,
        compute: Compute,
        attend: Attend,
        cache: Any,
        *,
        probe: Callable[[Block], Callable] = lambda layer: layer,
    ) -> tuple[jax.Array, Any]:
        """`hidden` with the attention that the caller defines, and the cache as it left it.

        For decoding: tokens and layers are not split. `probe` makes of a layer in use what is
        called in its place. Where layers are split after all, those of this device alone are used.
        """
        assert not compute.split_tokens
        x_BTD = embed(self.embedding[...], batch["tokens"], compute.dtype, False)
        bring = lambda layer: probe(gather(layer, compute.dtype))  # noqa: E731
        numbered = (self.blocks, jnp.arange(self.blocks.mlp_norm[...].shape[0]))
        x_BTD, cache = self._scanned(numbered, (x_BTD, cache), batch, compute, attend, bring)
        return self._normed(x_BTD, compute), cache

    def _normed(self, x_BTD: jax.Array, compute: Compute) -> jax.Array:
        norm = gather(self.norm, compute.dtype, split_tokens=compute.split_tokens)
        return rms_norm(x_BTD, norm[...], eps=self.config.norm_eps)

    def loss_terms(self, batch: Batch, compute: Compute) -> LossTerms:
        """Summed losses over the own ones of the batch's `targets` with a true `loss_mask`."""
        return cross_entropy(
            self.hidden(batch, compute),
            self.head_or_embedding[...],
            own(batch["targets"], compute),
            own(batch["loss_mask"], compute),
            vocab_size=self.config.vocab_size,
            chunk_tokens=compute.loss_chunk_tokens,
            z_weight=compute.z_weight,
            split_tokens=compute.split_tokens,
        )

    def token_nll(self, batch: Batch, compute: Compute) -> jax.Array:
        """Negative log-likelihood of each of the batch's `targets`, nats, float32 (B, T)."""
        return token_nll(
            self.hidden(batch, compute),
            self.head_or_embedding[...],
            batch["targets"],
            vocab_size=self.config.vocab_size,
            chunk_tokens=compute.loss_chunk_tokens,
        )

    def logits(self, batch: Batch, compute: Compute) -> jax.Array:
        """Float32 logits (B, T, V) of every token; for tests, never for training."""
        x_BTD = self.hidden(batch, compute)
        head_VD = gather(self.head_or_embedding, compute.dtype)[...]
        logits_BTV = linear(x_BTD, head_VD.T).astype(jnp.float32)
        return logits_BTV[:, :, : self.config.vocab_size]

    def next_logits(self, x_BD: jax.Array, compute: Compute) -> jax.Array:
        """Float32 logits (B, V) of the tokens after those with last hidden states `x_BD`.

        The head is used where it lies, V over `tensor`; its logits are then gathered, so that
        every device has all of V.
        """
        head_VD = gather(self.head_or_embedding, compute.dtype)[...]
        logits_BV = jnp.dot(x_BD, head_VD.T, preferred_element_type=jnp.float32)
        return all_gathered(logits_BV, "tensor", dim=1)[:, : self.config.vocab_size]

    @property
    def head_or_embedding(self) -> nnx.Param:
        """The matrix (V, D) that makes logits: the embedding where the two are tied."""
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
