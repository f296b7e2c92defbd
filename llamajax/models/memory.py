"""Estimate what a step holds in memory from its config alone: the formulas, before any compiler.

A plan's own figures come from the compiled program, and tests hold the two against each other.
`sizes` are the mesh's axis sizes everywhere.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from llamajax.config import RunConfig
from llamajax.config.schema import LORA_TARGETS
from llamajax.models.counts import matrices_per_layer
from llamajax.models.layer_order import padded_layers
from llamajax.models.lora import num_adapter_parameters

FLOAT32_BYTES = 4
_PROCESS_BYTES = 0.45 * 2**30  # Python, JAX and its threads, measured on the CPU


class DeviceShare(NamedTuple):
    """One device's share of the batch: rows a step, rows at a time, tokens of a row."""

    rows: int
    microbatch: int
    tokens: float


def device_share(config: RunConfig, sizes: Mapping[str, int]) -> DeviceShare:
    """Return what one device has of a batch."""
    rows = config.data.global_batch_size // (sizes["data"] * sizes["fsdp"])
    microbatch = rows // config.train.accumulation_steps
    return DeviceShare(rows, microbatch, config.data.seq_len / sizes["sequence"])


def width(config: RunConfig) -> int:
    """Return the bytes of a value in the compute dtype."""
    return 2 if config.train.activation_dtype == "bfloat16" else FLOAT32_BYTES


def float8_share(config: RunConfig) -> float:
    """Return the share of a layer's weights that are multiplied in 8 bits."""
    if config.train.dtype != "float8":
        return 0.0
    weights = matrices_per_layer(config.model, config.train.float8_targets)
    return weights / matrices_per_layer(config.model)


def weight_width(config: RunConfig) -> float:
    """Return the bytes of a gathered value of a layer's matrices, on average."""
    share = float8_share(config) if config.train.float8_scaling == "tensor" else 0.0
    return share + (1 - share) * width(config)


def state_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Return the bytes of weights, their average, and moments of a device, norms left out."""
    trained, frozen = _weights(config, sizes)
    base = 2 if config.lora.base_dtype == "bfloat16" else FLOAT32_BYTES
    kept = trained * _weight_width(config) + _moment_bytes(config, sizes)
    return kept + frozen * base


def _weight_width(config: RunConfig) -> int:
    """Return the bytes of a trained weight and, where there is one, of its average."""
    return FLOAT32_BYTES * (1 if config.optim.ema_decay is None else 2)


def _moment_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Return the bytes of a device's moments: AdamW has two of a weight, Muon one of a matrix."""
    moments, m = 2 * _weights(config, sizes)[0], config.model
    if config.optim.name == "muon":
        tables = m.padded_vocab_size * m.hidden_size * (1 if m.tie_embeddings else 2)
        shared = 0 if config.lora.rank else tables / (sizes["fsdp"] * sizes["tensor"])
        moments = moments / 2 + shared
    return moments * (2 if config.optim.moment_dtype == "bfloat16" else FLOAT32_BYTES)


def held_parts(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the bytes that a device cannot do without, by what they are: less than the peak.

    Gathered weights are those of one block, or of all of a pipeline's stage, with their gradients;
    activations what the policy of recomputation keeps for one microbatch, and one chunk of logits.
    """
    m = config.model
    layers = layers_held(config, sizes) if sizes["stage"] > 1 else 1
    matrices = matrices_per_layer(m) / sizes["tensor"]
    logits = config.train.loss_chunk_tokens * m.padded_vocab_size / sizes["tensor"] * FLOAT32_BYTES
    return {
        "weights and moments": state_bytes(config, sizes),
        "gradients": _weights(config, sizes)[0] * FLOAT32_BYTES,
        "gathered weights": matrices * layers * (weight_width(config) + FLOAT32_BYTES),
        "activations": logits + _kept_activations(config, sizes),
    }


def host_bytes(
    config: RunConfig, sizes: Mapping[str, int], *, num_devices: int, is_host: bool
) -> float:
    """Return the memory of its host that a process with `num_devices` devices cannot do without.

    A save copies one replica of the trained weights and their moments; the host keeps the moments
    with `optim.offload`; where the devices are the host's cores, it holds all that they do.
    Measured on 2 cores, less what a process without a model takes: 1,283 MiB where this says 1,260
    (32 M parameters), 3,796 and 3,827 (135 M).
    """
    replicas = min(num_devices, sizes["data"] * sizes["sequence"])
    trained = _weights(config, sizes)[0] * num_devices
    moments = _moment_bytes(config, sizes) * num_devices
    one = trained / replicas
    if config.lora.rank:  # sides of factors are copies along the axes that do not split them
        one = min(one, num_adapter_parameters(config.model, config.lora))
    saved = one * (_weight_width(config) + moments / trained)
    if is_host:
        held = held_bytes(config, sizes) * num_devices
    else:
        held = moments if config.optim.offload else 0.0
    return _PROCESS_BYTES + saved + held


def held_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Return the sum of `held_parts`."""
    return sum(held_parts(config, sizes).values())


def _weights(config: RunConfig, sizes: Mapping[str, int]) -> tuple[float, float]:
    """Return the numbers of trained and of frozen weights that a device holds, norms left out."""
    m = config.model
    blocks = matrices_per_layer(m) * layers_held(config, sizes)
    tables = m.padded_vocab_size * m.hidden_size * (1 if m.tie_embeddings else 2)
    weights = (blocks + tables) / (sizes["fsdp"] * sizes["tensor"])
    if not config.lora.rank:
        return weights, 0.0
    # a side of a factor is split along one axis, the rank along none
    sides = [letters for target in config.lora.targets for letters in LORA_TARGETS[target]]
    adapters = sum(
        math.prod(m.dims[letter] for letter in side) / sizes["fsdp" if "D" in side else "tensor"]
        for side in sides
    )
    return adapters * config.lora.rank * layers_held(config, sizes), weights


def layers_held(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Return the layers that a device holds, with those that fill up the last stages."""
    stages = sizes["stage"]
    rounds = config.train.pipeline_rounds
    return padded_layers(config.model.num_layers, stages=stages, rounds=rounds) / stages


def _kept_activations(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Return the bytes kept for the backward pass.

    `none` keeps what derivatives use: the inputs of products, six values of a feed-forward's width,
    and of each norm two float32 values, one where its scale is frozen; no input of the block
    besides. Where `tensor` splits tokens, inputs of products and results that it scatters are
    whole. What adapters have of their rank is left out.
    """
    m, t, share = config.model, config.train, device_share(config, sizes)
    layers, rows = layers_held(config, sizes), share.microbatch
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
    norms = (2 if config.lora.rank else 4) * m.hidden_size * FLOAT32_BYTES / width(config)
    everything = qkv + attended + m.hidden_size + 2 * whole + 6 * m.intermediate_size + norms
    kept = {
        "full": 0,
        "save_attention": attended,
        "save_qkv": attended + qkv,
        "dots": qkv + attended + m.hidden_size + 2 * m.intermediate_size + whole,
        "none": everything,
    }.get(t.remat, 0)
    working = 0 if t.remat in ("dots", "none") else everything  # one block, recomputed
    values = layers * kept + working
    return inputs + rows * (layers * residual + tokens * values * width(config))
