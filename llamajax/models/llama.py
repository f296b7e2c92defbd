"""Llama 2 and 3: one forward pass for training, evaluation, decoding, and `replay`.

Names of arrays end in the letters of their dimensions:

    B  rows of a batch           N  query heads                  D  width of the model
    T  local tokens of a row     K  key-value heads, N = G x K   F  width of the feed-forward layer
    S  all tokens of a row       H  width of a head              V  vocabulary, padded
    Q  microbatches              L  layers                       G  query heads of a key-value head

Inside a `sharded_step` (explained below) a letter counts what the device has of it.

A weight is declared once, by its letters: `normal(config, "DNH", ...)` makes an array (D, N, H).
Shape, sharding, weight decay, and names in other formats follow from the letters.
`weight[...]` is its array.

A model is a pytree of float32 weights (Flax NNX modules that hold nothing mutable). The same code
runs on one device, where arrays are whole, and in a `sharded_step` (a `jax.shard_map` over the
mesh), where every array is one device's part. All communication of the forward pass is in a few
functions, whose transposes communicate in the backward pass:

- `gather` rounds weights to the compute dtype, on one device too, and joins their parts along the
  mesh axis `fsdp`. It runs at the top of each layer, so that only one layer is whole at a time (in
  a pipeline: the layers of one stage).
- `enter_tensor` and `leave_tensor` communicate around matrices that are split over the axis
  `tensor`: `leave_tensor` sums the partial products that such a pair of matrices gives. With
  `split_tokens` (sequence parallelism), norms and residuals have only a part of the tokens on each
  device: `leave_tensor` scatters the sums, and `enter_tensor` gathers the tokens again.
- `embed` and `cross_entropy` communicate for the embedding and the head; `attention` joins the keys
  and values of a row that is split over `sequence`.

The axes `data` and `fsdp` split the rows of a batch; devices that differ only along `tensor`,
`sequence` or `stage` get the same rows, with all their tokens. Of these a device embeds, and
computes the loss of, its `local_part`:

- along `sequence`, its part of the tokens of each row;
- along `stage`, with P stages, every P-th microbatch. All microbatches pass through the layers of
  all stages; embedding and loss are shared out in this way.

Where an axis has one device, and outside `shard_map`, nothing is communicated.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llamajax.config.schema import ModelConfig
from llamajax.models.declare import named_key, normal, ones
from llamajax.models.lora import fold_in, project, with_scales
from llamajax.models.pipeline import (
    PipelineOptions,
    gather_stage,
    local_microbatches,
    num_stages,
    run_pipeline,
    with_fp32_grad,
)
from llamajax.models.remat import remat_policy
from llamajax.ops.attention import attention, documents_for
from llamajax.ops.attention_split import local_tokens
from llamajax.ops.cross_entropy import LossTerms, TokenScores, cross_entropy, token_scores
from llamajax.ops.embedding import embed
from llamajax.ops.linear import linear
from llamajax.ops.norm import rms_norm
from llamajax.ops.rope import angles, attention_factor, frequencies, rotate
from llamajax.sharding.collectives import (
    all_gather,
    enter_tensor,
    gather,
    leave_tensor,
    pcast_varying_like,
    psum,
)
from llamajax.sharding.float8 import Float8

# Arrays (B, S), or (B, T) of a local part, by name:
#     tokens, positions     int32; a position counts from the start of a document
#     targets, loss_mask    int32, bool; for losses alone
#     segment_ids           int32, always (B, S): a number for each document; if there is none, a
#                           row is one document
#     dropout_keys          a key for each token, of the dropout in LoRA adapters; if there is none,
#                           nothing is dropped
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How a model is computed: speed, memory, rounding. Only `z_weight` changes the objective."""

    dtype: jnp.dtype
    remat: str  # a policy of models/remat.py
    attention: str  # an implementation of ops/attention.py
    loss_chunk_tokens: int  # tokens whose logits exist at one time
    z_weight: float = 0.0  # of the z-loss in the objective
    remat_keep: tuple[str, ...] = ()  # checkpoint names to keep besides the policy's
    remat_offload: tuple[str, ...] = ()  # checkpoint names to keep in the host's memory
    split_tokens: bool = False  # split T, between matrices, over `tensor`, whose size divides T
    pipeline: PipelineOptions = dataclasses.field(default_factory=PipelineOptions)
    float8: Float8 | None = None  # the layers' products in 8 bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """What a layer needs besides its weights and its activations."""

    compute: Compute
    cos_sin: tuple[jax.Array, jax.Array]  # of the rotary embedding, float32 (B, T, H / 2)
    documents: Any  # of `documents_for`; None where a row is one document
    dropout_keys_BT: jax.Array | None
    number: jax.Array | None = None  # of the layer, int32 scalar; set by `walk_layers`

    def attend(self, q_BTNH, k_BTKH, v_BTKH) -> tuple[jax.Array, None]:
        """Compute causal attention inside each document, (B, T, N, H): the Attend of training."""
        impl, documents = self.compute.attention, self.documents
        return attention(q_BTNH, k_BTKH, v_BTKH, impl=impl, segment_ids_BT=documents), None


# (q, k, v) -> output (B, T, N, H) of the attention, and anything that the caller wants returned:
# decoding writes and reads a cache here.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Attention(nnx.Module):
    """Self-attention with grouped queries and rotary positions.

    The `_lora` attributes are adapters that `models/lora.py` attaches. `checkpoint_name` gives an
    array a name by which a remat policy can keep it for the backward pass.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.query = normal(config, "DNH", key, "query")
        self.key = normal(config, "DKH", key, "key")
        self.value = normal(config, "DKH", key, "value")
        self.out = normal(config, "NHD", key, "out")
        self.query_lora = self.key_lora = self.value_lora = self.out_lora = nnx.data(None)

    def __call__(self, x_BTD, inputs: LayerInputs, attend: Attend) -> tuple[jax.Array, Any]:
        keys_BT = inputs.dropout_keys_BT
        q_BTNH = project(x_BTD, self.query, self.query_lora, keys_BT)
        k_BTKH = project(x_BTD, self.key, self.key_lora, keys_BT)
        v_BTKH = checkpoint_name(project(x_BTD, self.value, self.value_lora, keys_BT), "qkv")
        q_BTNH = checkpoint_name(rotate(q_BTNH, inputs.cos_sin), "qkv")
        k_BTKH = checkpoint_name(rotate(k_BTKH, inputs.cos_sin), "qkv")
        with jax.named_scope("attention"):  # traces and their summary show it
            o_BTNH, extra = attend(q_BTNH, k_BTKH, v_BTKH)
        return project(o_BTNH, self.out, self.out_lora, keys_BT, contract=2), extra


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
        return project(jax.nn.silu(gate_BTF) * up_BTF, self.down, self.down_lora, keys_BT)


class Block(nnx.Module):
    """One layer: attention, then feed-forward, each a residual branch that begins with a norm."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.norm_eps = config.norm_eps
        self.attention_norm = ones(config, "D")
        self.attention = Attention(config, named_key(key, "attention"))
        self.mlp_norm = ones(config, "D")
        self.mlp = FeedForward(config, named_key(key, "mlp"))

    def __call__(self, x_BTD, inputs: LayerInputs, attend: Attend) -> tuple[jax.Array, Any]:
        """Return the activations after the layer, and what `attend` returned besides its output."""
        split = inputs.compute.split_tokens
        x_BTD = checkpoint_name(x_BTD, "block_input")
        h_BTD = rms_norm(x_BTD, self.attention_norm[...], eps=self.norm_eps)
        h_BTD = enter_tensor(h_BTD, split_tokens=split)
        h_BTD, extra = self.attention(h_BTD, inputs, attend)
        x_BTD = x_BTD + leave_tensor(h_BTD, split_tokens=split)
        x_BTD = checkpoint_name(x_BTD, "mlp_input")
        h_BTD = rms_norm(x_BTD, self.mlp_norm[...], eps=self.norm_eps)
        h_BTD = self.mlp(enter_tensor(h_BTD, split_tokens=split), inputs.dropout_keys_BT)
        return x_BTD + leave_tensor(h_BTD, split_tokens=split), extra


# (block, activations, carry, inputs) -> activations, carry, output: what is done with each layer,
# in the form of a body of `jax.lax.scan`. Decoding carries its cache of keys and values; `replay`
# outputs the number of values that are not finite.
Visit = Callable[[Any, jax.Array, Any, LayerInputs], tuple[jax.Array, Any, Any]]


def apply_block(block: Block, x_BTD: jax.Array, carry: Any, inputs: LayerInputs):
    """Run a layer: the Visit of training, without a carry or an output."""
    return block(x_BTD, inputs, inputs.attend)[0], carry, None


def walk_layers(
    visit: Visit, layers: Any, numbers: jax.Array, x_BTD: jax.Array, carry: Any, inputs: LayerInputs
) -> tuple[jax.Array, Any, Any]:
    """Visit stacked layers in order: the one loop over layers, whatever the model is used for.

    `layers` are stacked along a leading dimension; `numbers` are their positions in the model.
    Returns the activations and the carry after the last layer, and the stacked outputs of all. The
    backward pass uses what the remat policy keeps of each layer, and computes the rest again.
    """

    def body(activations_and_carry: tuple, layer_and_number: tuple) -> tuple[tuple, Any]:
        (x_BTD, carry), (layer, number) = activations_and_carry, layer_and_number
        keys_BT = fold_in(inputs.dropout_keys_BT, number)  # each layer drops other features
        here = dataclasses.replace(inputs, number=number, dropout_keys_BT=keys_BT)
        x_BTD, carry, output = visit(layer, x_BTD, carry, here)
        return (x_BTD, carry), output

    c = inputs.compute
    policy = remat_policy(c.remat, keep=c.remat_keep, offload=c.remat_offload)
    # A scan needs no protection against common subexpression elimination.
    body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    (x_BTD, carry), outputs = jax.lax.scan(body, (x_BTD, carry), (layers, numbers))
    return x_BTD, carry, outputs


def local_part(x_BS: jax.Array, compute: Compute) -> jax.Array:
    """Return the rows and tokens of an array that this device embeds and computes the loss of."""
    return local_microbatches(local_tokens(x_BS), microbatch_size=compute.pipeline.microbatch_size)


def from_local_part(x: jax.Array, shape_BS: tuple[int, int], compute: Compute) -> jax.Array:
    """Join what the devices along `sequence` and `stage` have computed of their `local_part`."""
    if x.shape == shape_BS:
        return x
    number_BS = jnp.arange(math.prod(shape_BS), dtype=jnp.int32).reshape(shape_BS)
    where = local_part(number_BS, compute).reshape(-1)
    zeros = pcast_varying_like(jnp.zeros(math.prod(shape_BS), jnp.float32), x)
    flat = zeros.at[where].set(x.reshape(-1).astype(jnp.float32), unique_indices=True)
    return psum(flat, ("sequence", "stage")).reshape(shape_BS).astype(x.dtype)


class Llama(nnx.Module):
    """The whole model. `blocks` is one Block whose weights have a leading dimension L.

    Training and its evaluation call `loss_terms`, scoring of texts calls `token_scores`. Both call
    `hidden_states`, which calls `forward` on the local tokens, or runs the pipeline if layers are
    split over `stage`. Decoding and `replay` call `forward` themselves, on meshes without `stage`.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        self.embedding = normal(config, "VD", key, "embedding")
        keys = jax.random.split(named_key(key, "blocks"), config.num_layers)
        self.blocks = jax.vmap(lambda k: Block(config, k))(keys)
        self.norm = ones(config, "D")
        self.head = None if config.tie_embeddings else normal(config, "VD", key, "head")

    @property
    def head_or_embedding(self) -> nnx.Param:
        """The matrix (V, D) that makes logits: the embedding where the two are tied."""
        return self.embedding if self.head is None else self.head

    def loss_terms(self, batch: Batch, compute: Compute) -> LossTerms:
        """Sum the losses of the local targets whose `loss_mask` is true."""
        return cross_entropy(
            self.hidden_states(batch, compute),
            self.head_or_embedding[...],
            local_part(batch["targets"], compute),
            local_part(batch["loss_mask"], compute),
            vocab_size=self.config.vocab_size,
            chunk_tokens=compute.loss_chunk_tokens,
            z_weight=compute.z_weight,
            split_tokens=compute.split_tokens,
        )

    def token_scores(self, batch: Batch, compute: Compute) -> TokenScores:
        """Return the scores of each target (B, S), the same along `sequence` and `stage`."""
        targets_BS = batch["targets"]
        found = token_scores(
            self.hidden_states(batch, compute),
            self.head_or_embedding[...],
            local_part(targets_BS, compute),
            vocab_size=self.config.vocab_size,
            chunk_tokens=compute.loss_chunk_tokens,
            split_tokens=compute.split_tokens,
        )
        return jax.tree.map(lambda x: from_local_part(x, targets_BS.shape, compute), found)

    def hidden_states(self, batch: Batch, compute: Compute) -> jax.Array:
        """Return the last hidden states (B, T, D) of this device's `local_part` of the batch.

        With `split_tokens` each device along `tensor` has its part of T.
        """
        per_token = ("tokens", "positions", "dropout_keys")
        local = {name: local_tokens(batch[name]) for name in per_token if name in batch}
        if "segment_ids" in batch:
            local["segment_ids"] = batch["segment_ids"]  # attention reads those of all keys
        if num_stages() > 1:
            return self._pipelined_states(local, compute)
        return self.forward(local, compute)[0]

    def forward(
        self, batch: Batch, compute: Compute, visit: Visit = apply_block, carry: Any = None
    ) -> tuple[jax.Array, Any, Any]:
        """Embed the tokens of `batch`, run `visit` on each layer in order, and normalize.

        Returns the last hidden states (B, T, D) in the compute dtype, the last carry, and the
        outputs of the visits, stacked to a leading dimension L. `visit` gets each block with its
        weights gathered.
        """
        dtype, split = compute.dtype, compute.split_tokens

        def gather_and_visit(layer, x_BTD, carry, inputs: LayerInputs):
            return visit(gather(layer, dtype, split_tokens=split), x_BTD, carry, inputs)

        x_BTD = embed(self.embedding[...], batch["tokens"], dtype, split)
        inputs = self._layer_inputs(batch, compute)
        blocks = with_scales(self.blocks, compute.float8)
        numbers = jnp.arange(self.blocks.mlp_norm[...].shape[0])  # L: any weight has it
        x_BTD, carry, outputs = walk_layers(gather_and_visit, blocks, numbers, x_BTD, carry, inputs)
        return self._normalize(x_BTD, compute), carry, outputs

    def _pipelined_states(self, batch: Batch, compute: Compute) -> jax.Array:
        """Return `hidden_states` where layers are split over `stage`.

        Microbatches pass stage after stage. Each stage gathers its layers once for all of them, and
        sums their gradients in float32. B counts the rows of one microbatch in arrays with Q and
        inside `stage`, elsewhere those of this stage's share.
        """
        dtype, split = compute.dtype, compute.split_tokens
        size = compute.pipeline.microbatch_size
        tokens_BT = local_microbatches(batch["tokens"], microbatch_size=size)
        x_BTD = embed(self.embedding[...], tokens_BT, dtype, split)
        batches = {k: x.reshape(-1, size, *x.shape[1:]) for k, x in batch.items()}  # of all stages

        def visit(layer, x_BTD, carry, inputs: LayerInputs):
            return apply_block(with_fp32_grad(layer), x_BTD, carry, inputs)

        def stage(layers, x_BTD, numbers, microbatch):
            inputs = self._layer_inputs({k: x[microbatch] for k, x in batches.items()}, compute)
            return walk_layers(visit, layers, numbers, x_BTD, None, inputs)[0]

        blocks = with_scales(self.blocks, compute.float8)
        layers = gather_stage(blocks, dtype, split_tokens=split)
        x_QBTD = x_BTD.reshape(-1, size, *x_BTD.shape[1:])
        x_BTD = run_pipeline(stage, layers, x_QBTD, compute.pipeline).reshape(x_BTD.shape)
        return self._normalize(x_BTD, compute)

    def _layer_inputs(self, batch: Batch, compute: Compute) -> LayerInputs:
        c = self.config
        frequency = frequencies(c.head_size, theta=c.rope_theta, scaling=c.rope_scaling)
        return LayerInputs(
            compute=compute,
            cos_sin=angles(batch["positions"], frequency, attention_factor(c.rope_scaling)),
            documents=documents_for(compute.attention, batch.get("segment_ids")),
            dropout_keys_BT=batch.get("dropout_keys"),
        )

    def _normalize(self, x_BTD: jax.Array, compute: Compute) -> jax.Array:
        norm = gather(self.norm, compute.dtype, split_tokens=compute.split_tokens)
        return rms_norm(x_BTD, norm[...], eps=self.config.norm_eps)

    def logits(self, batch: Batch, compute: Compute) -> jax.Array:
        """Return float32 logits (B, T, V) of the local tokens, where `tensor` is 1; for tests."""
        head_VD = gather(self.head_or_embedding, compute.dtype)[...]
        logits_BTV = linear(self.hidden_states(batch, compute), head_VD.T).astype(jnp.float32)
        return logits_BTV[:, :, : self.config.vocab_size]

    def next_logits(self, x_BD: jax.Array, compute: Compute) -> jax.Array:
        """Return float32 logits (B, V) of the next token, given each row's last hidden state.

        Each device along `tensor` computes its part of V; the parts are then gathered.
        """
        head_VD = gather(self.head_or_embedding, compute.dtype)[...].astype(compute.dtype)
        logits_BV = jnp.dot(x_BD, head_VD.T, preferred_element_type=jnp.float32)
        return all_gather(logits_BV, "tensor", dim=1)[:, : self.config.vocab_size]
