"""Estimate what a step sends and holds from its config alone: the formulas, before any compiler.

They order and prune a search; a plan's own figures come from the compiled program, and tests hold
the two against each other. `sizes` are the mesh's axis sizes everywhere.
"""

import collections
import math
from collections.abc import Mapping, Sequence

from llamajax.config import RunConfig
from llamajax.models.layer_order import padded_layers
from llamajax.models.pipeline import num_ticks
from llamajax.planning.roofline import (
    FLOAT32_BYTES,
    device_share,
    matrices_per_layer,
    pipeline_facts,
    width,
)


def sent_bytes(config: RunConfig, sizes: Mapping[str, int]) -> dict[tuple[str, ...], float]:
    """Return the bytes that a device sends in a step by mesh axes, of weights and activations.

    n devices on an axis send (n - 1) / n of what they gather or scatter, twice that of what they
    sum. A block works on every row that passes it; in a pipeline also on what idle ticks carry.

    - fsdp: a block's weights in the compute dtype are gathered for the forward and again for the
      backward pass, and their gradients scattered in float32, each microbatch; the head once each.
      In a pipeline, once each accumulation step and the forward pass alone; without recomputation
      they are kept. Embedded tokens are exchanged in both directions.
    - tensor: the residual is gathered before and scattered after attention and the feed-forward, in
      both directions (8 times a block); recomputing a block gathers twice and scatters once more,
      recomputing a stage 4 times more; around embedding and head together 4 times.
    - sequence: keys and values of all tokens, forward and backward, and once more where a stage is
      recomputed; their gradients in float32.
    - stage: in a tick an activation to the next stage, one from the embedding and one to the loss,
      forward and backward.
    - wherever weights are copies of one another, their gradients in float32 are summed once a step:
      those of blocks along data and sequence, of embedding and head along stage as well.
    """
    m, t, share = config.model, config.train, device_share(config, sizes)
    value, pipe = width(config), pipeline_facts(config, sizes)
    layers, rows = _layers(config, sizes), share.rows / sizes["stage"]
    again = pipe is not None and t.remat_stage
    if pipe is None:
        ticks, passed = 0, share.rows * layers
    else:
        ticks = t.accumulation_steps * num_ticks(
            stages=pipe.stages, microbatches=pipe.microbatches, rounds=pipe.rounds
        )
        passed = ticks * t.microbatch_size * layers / pipe.rounds

    matrices = matrices_per_layer(m) / sizes["tensor"] * layers
    table = m.padded_vocab_size * m.hidden_size / sizes["tensor"]
    gathers = 1 if pipe is not None or t.remat == "none" else 2
    weights = matrices * (gathers * value + FLOAT32_BYTES) + table * (value + FLOAT32_BYTES)
    residual = share.tokens * m.hidden_size * value  # of a row
    keys = config.data.seq_len * 2 * m.num_kv_heads * m.head_size / sizes["tensor"]
    exchanges = (8 if t.remat == "none" else 11) + 4 * again
    tables = table * (1 if m.tie_embeddings else 2)
    found = [
        (("fsdp",), weights * t.accumulation_steps + 2 * rows * residual),
        (("tensor",), residual * (passed * exchanges + 4 * rows)),
        (("sequence",), passed * keys * ((2 + again) * value + FLOAT32_BYTES)),
        (("data", "sequence"), 2 * FLOAT32_BYTES * matrices / sizes["fsdp"]),
        (("data", "stage", "sequence"), 2 * FLOAT32_BYTES * tables / sizes["fsdp"]),
    ]
    sent: collections.Counter[tuple[str, ...]] = collections.Counter()
    for along, amount in found:
        axes = tuple(axis for axis in along if sizes[axis] > 1)
        if axes:
            sent[axes] += amount * (1 - 1 / math.prod(sizes[axis] for axis in axes))
    if pipe is not None:
        sent[("stage",)] += 6 * ticks * t.microbatch_size * residual / sizes["tensor"]
    return dict(sent)


def axes_slow_share(axes: Sequence[str], sizes: Mapping[str, int], nodes: Sequence[int]) -> float:
    """Return the part of what is sent along `axes` that leaves a node, as `slow_share` does.

    `nodes`: number of the node at each position of a mesh of `sizes`, in its order.
    """
    positions, stride = [0], 1
    for axis in reversed(list(sizes)):
        if axis in axes:
            positions = [n + i * stride for n in positions for i in range(sizes[axis])]
        stride *= sizes[axis]
    counts = collections.Counter(nodes[n] for n in positions)
    return 0.0 if len(counts) == 1 else 1 / max(counts.values())


def state_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Return the bytes of the weights and both moments that a device holds, norms left out."""
    moment = FLOAT32_BYTES if config.optim.moment_dtype == "float32" else 2
    return _weights(config, sizes) * (2 * FLOAT32_BYTES + moment)


def held_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Return the bytes that a device cannot do without: less than the peak, as a rule.

    Weights, moments and gradients; what the policy of recomputation keeps of each block for one
    microbatch; the gathered weights of one block, or of all of them where they are kept, and one
    block's gradients; one chunk of logits.
    """
    m = config.model
    state = state_bytes(config, sizes) + _weights(config, sizes) * FLOAT32_BYTES
    # a pipeline gathers all layers of its stage at once, and `none` keeps what was gathered
    whole = sizes["stage"] > 1 or config.train.remat == "none"
    layers = _layers(config, sizes) if whole else 1
    gradients = layers if sizes["stage"] > 1 else 1
    matrices = matrices_per_layer(m) / sizes["tensor"]
    block = matrices * (layers * width(config) + gradients * FLOAT32_BYTES)
    logits = config.train.loss_chunk_tokens * m.padded_vocab_size / sizes["tensor"] * FLOAT32_BYTES
    return state + block + logits + _kept_activations(config, sizes)


def _weights(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Return the number of weights that a device holds, norms left out."""
    m = config.model
    blocks = matrices_per_layer(m) * _layers(config, sizes)
    tables = m.padded_vocab_size * m.hidden_size * (1 if m.tie_embeddings else 2)
    return (blocks + tables) / (sizes["fsdp"] * sizes["tensor"])


def _layers(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Return the layers that a device holds, with those that fill up the last stages."""
    stages = sizes["stage"]
    rounds = config.train.pipeline_rounds
    return padded_layers(config.model.num_layers, stages=stages, rounds=rounds) / stages


def _kept_activations(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Return the bytes kept for the backward pass.

    What `none` keeps, and whole tokens of a sum that `tensor` scatters, were fitted to compiled
    programs for GPUs (benchmarks/results, 2026-11-28).
    """
    m, t, share = config.model, config.train, device_share(config, sizes)
    layers, rows = _layers(config, sizes), share.microbatch
    tokens = share.tokens / sizes["tensor"]
    residual = tokens * m.hidden_size * width(config)
    inputs = 0.0
    if sizes["stage"] > 1 and t.remat_stage:
        # a stage's inputs of all ticks, and what its layers keep for one microbatch
        inputs = residual * rows * t.pipeline_rounds
        layers, rows = layers / t.pipeline_rounds, t.microbatch_size
    attended = m.num_heads * m.head_size
    qkv = attended + 2 * m.num_kv_heads * m.head_size
    whole = m.hidden_size * (sizes["tensor"] - 1)
    everything = 1.5 * (qkv + attended) + 3 * m.hidden_size + 5 * m.intermediate_size + whole
    kept = {
        "full": 0,
        "save_attention": attended,
        "save_qkv": attended + qkv,
        "dots": qkv + attended + 2 * m.hidden_size + 2 * m.intermediate_size + whole,
        "none": everything,
    }.get(t.remat, 0)
    working = 0 if t.remat in ("dots", "none") else everything  # one block, recomputed
    values = layers * kept + working
    return inputs + rows * (layers * residual + tokens * values * width(config))
