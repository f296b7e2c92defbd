"""What a step sends and holds, from its configuration alone: the formulas, before any compiler.

They order and prune a search; a plan's own figures come from the compiled program, and tests hold
the two against each other.
"""

import collections
from collections.abc import Mapping, Sequence

from llamajax.config import RunConfig
from llamajax.planning.roofline import Shares, matrices_per_layer, width

_SINGLE = 4


def sent_bytes(config: RunConfig, sizes: Mapping[str, int]) -> dict[tuple[str, ...], float]:
    """Bytes that a device sends in a step by mesh axis, those of weights and activations.

    n devices on an axis send (n - 1) / n of what they gather or scatter.

    - fsdp: a block's weights in the compute dtype are gathered for the forward and again for the
      backward pass, and their gradients scattered in float32, each microbatch; the head once each.
      In a pipeline, once each accumulation step and the forward pass alone.
    - tensor: the residual is gathered before and scattered after attention and the feed-forward, in
      both directions (8 times a block); recomputing a block gathers twice and scatters once more;
      around embedding and head together 4 times.
    - sequence: keys and values of all tokens, forward, backward and recomputed.
    - stage: a boundary activation forward and one backward, each microbatch.
    - data: the gradients in float32, summed once a step.
    """
    m, share = config.model, Shares.of(config, sizes)
    part = lambda axis: (sizes[axis] - 1) / sizes[axis]  # noqa: E731
    remat = config.train.remat
    exchanges = {"none": 8, "dots": 10}.get(remat, 11)
    accumulation, layers = config.train.accumulation_steps, m.num_layers / sizes["stage"]
    matrices = matrices_per_layer(m) / sizes["tensor"] * layers
    table = m.padded_vocab_size * m.hidden_size / sizes["tensor"]
    gathers = 1 if sizes["stage"] > 1 else 2
    weights = matrices * (gathers * width(config) + _SINGLE) + table * (width(config) + _SINGLE)
    residual = share.rows * share.tokens * m.hidden_size * width(config)
    keys = share.rows * share.tokens * sizes["sequence"] * 2 * m.num_kv_heads * m.head_size
    held = (m.num_layers * matrices_per_layer(m) / sizes["stage"] + 2 * table * sizes["tensor"]) / (
        sizes["fsdp"] * sizes["tensor"]
    )
    found = {
        "data": 2 * held * _SINGLE * part("data"),
        "stage": 2 * residual / sizes["tensor"] * (config.train.pipeline_rounds + 1),
        "fsdp": weights * accumulation * part("fsdp"),
        "sequence": keys / sizes["tensor"] * layers * width(config)
        * (3 if remat == "none" else 4) * part("sequence"),
        "tensor": residual * (layers * exchanges + 4) * part("tensor"),
    }  # fmt: skip
    return {(axis,): amount for axis, amount in found.items() if sizes[axis] > 1}


def axes_slow_share(axes: Sequence[str], sizes: Mapping[str, int], nodes: Sequence[int]) -> float:
    """Part of what is sent along `axes` that goes from one node to another, by `slow_share`.

    `nodes`: number of the node at each place of a mesh of `sizes`, in its order.
    """
    places, stride = [0], 1
    for axis in reversed(list(sizes)):
        if axis in axes:
            places = [n + i * stride for n in places for i in range(sizes[axis])]
        stride *= sizes[axis]
    counts = collections.Counter(nodes[place] for place in places)
    return 0.0 if len(counts) == 1 else 1 / max(counts.values())


def held_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Bytes that a device cannot do without: a lower bound of the peak.

    Weights, moments and gradients; what the policy of recomputation keeps of each block for one
    microbatch; one block's gathered weights and their gradients; one chunk of logits.
    """
    m, share = config.model, Shares.of(config, sizes)
    blocks = m.num_layers * matrices_per_layer(m) / share.weights
    table = m.padded_vocab_size * m.hidden_size / (sizes["fsdp"] * sizes["tensor"])
    held = blocks + table * (1 if m.tie_embeddings else 2)
    moment = _SINGLE if config.optim.moment_dtype == "float32" else 2
    state = held * (3 * _SINGLE + moment)
    # a pipeline gathers all layers of its stage at once
    gathered = m.num_layers / sizes["stage"] if sizes["stage"] > 1 else 1
    block = matrices_per_layer(m) / sizes["tensor"] * gathered * (width(config) + _SINGLE)
    logits = config.train.loss_chunk_tokens * m.padded_vocab_size / sizes["tensor"] * _SINGLE
    return state + block + logits + _kept_activations(config, sizes, share)


def _kept_activations(config: RunConfig, sizes: Mapping[str, int], share: Shares) -> float:
    m, t = config.model, config.train
    layers, rows = m.num_layers / sizes["stage"], share.microbatch
    tokens = share.tokens / sizes["tensor"]
    residual = tokens * m.hidden_size * width(config)
    inputs = 0.0
    if sizes["stage"] > 1 and t.remat_stage:
        # a stage's inputs of all ticks, and what its layers keep for one microbatch
        inputs = residual * rows * t.pipeline_rounds
        layers, rows = layers / t.pipeline_rounds, t.microbatch_size
    attended = m.num_heads * m.head_size
    qkv = attended + 2 * m.num_kv_heads * m.head_size
    products = qkv + attended + 2 * m.hidden_size + 2 * m.intermediate_size
    kept = {
        "full": 0,
        "save_attention": attended,
        "save_qkv": attended + qkv,
        "dots": products,
        "none": 1.5 * products + 4 * m.hidden_size,
    }
    return inputs + rows * layers * (residual + tokens * kept.get(t.remat, 0) * width(config))
