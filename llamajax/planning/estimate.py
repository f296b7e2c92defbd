"""Estimate what a step sends from its config alone: the formulas, before any compiler.

They order and prune a search; a plan's own figures come from the compiled program, and tests hold
the two against each other. `sizes` are the mesh's axis sizes everywhere.
"""

import collections
import math
from collections.abc import Mapping, Sequence

import numpy as np

from llamajax.config import RunConfig
from llamajax.models.counts import matrices_per_layer
from llamajax.models.memory import FLOAT32_BYTES, device_share, layers_held, weight_width, width
from llamajax.models.pipeline import num_ticks
from llamajax.planning.muon_cost import muon_sent_bytes
from llamajax.planning.roofline import pipeline_facts
from llamajax.planning.traffic import slow_share


def sent_bytes(config: RunConfig, sizes: Mapping[str, int]) -> dict[tuple[str, ...], float]:
    """Return the bytes that a device sends in a step by mesh axes, of weights and activations.

    n devices on an axis send (n - 1) / n of what they gather or scatter, twice that of what they
    sum. A block works on every row that passes it; in a pipeline also on what idle ticks carry.

    - fsdp: a block's weights in the compute dtype, or in 8 bits, are gathered for the forward and
      again for the backward pass, and their gradients scattered in float32, each microbatch; the
      head once each.
      In a pipeline, once each accumulation step and the forward pass alone. Embedded tokens are
      exchanged in both directions.
    - tensor: the residual is gathered before and scattered after attention and the feed-forward, in
      both directions (8 times a block); recomputing a block gathers twice and scatters once more,
      recomputing a stage 4 times more; around embedding and head together 4 times.
    - sequence: keys and values of all tokens, forward and backward, and once more where a stage is
      recomputed; their gradients in float32.
    - stage: in a tick an activation to the next stage, one from the embedding and one to the loss,
      forward and backward.
    - wherever weights are copies of one another, their gradients in float32 are summed once a step:
      those of blocks along data and sequence, of embedding and head along stage as well.
    - what `muon_sent_bytes` says.
    """
    m, t, share = config.model, config.train, device_share(config, sizes)
    value, pipe = width(config), pipeline_facts(config, sizes)
    layers, rows = layers_held(config, sizes), share.rows / sizes["stage"]
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
    gathers = 2 if pipe is None else 1
    weights = matrices * (gathers * weight_width(config) + FLOAT32_BYTES)
    weights += table * (value + FLOAT32_BYTES)
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
    sent.update({(axis,): amount for axis, amount in muon_sent_bytes(config, sizes).items()})
    for along, amount in found:
        axes = tuple(axis for axis in along if sizes[axis] > 1)
        if axes:
            sent[axes] += amount * (1 - 1 / math.prod(sizes[axis] for axis in axes))
    if pipe is not None:
        sent[("stage",)] += 6 * ticks * t.microbatch_size * residual / sizes["tensor"]
    return dict(sent)


def axes_slow_share(axes: Sequence[str], sizes: Mapping[str, int], nodes: Sequence[int]) -> float:
    """Return the part of what is sent along `axes` that leaves a node.

    `nodes`: number of the node at each position of a mesh of `sizes`, in its order.
    """
    positions = np.arange(len(nodes)).reshape(tuple(sizes.values()))
    group = positions[tuple(slice(None) if axis in axes else 0 for axis in sizes)]
    return slow_share("all-gather", [group.ravel().tolist()], nodes)
