"""Predict the time of a step from its operations, its memory traffic and what it sends: a roofline.

What no compiler says is estimated here with figures of the device table. All assumptions:

- matrix products run at `Device.efficiency` of the peak, attention's at a part of that which
  depends on the kernel; recomputation is counted, and only the causal half of attention;
- products in 8 bits run at 0.8 of that share, of their own peak; head and attention are in
  bfloat16; each value that is quantized is read twice and written once, and transposed once. With
  scales by rows it is quantized twice, and gathered weights in each pass (Llama2-7B on h100:8: 656
  GB a step more by this, 731 in the compiled program, `program_bytes.py`, 2026-11-30);
- element-wise work and the optimizer are bound by the bandwidth of the device's memory and overlap
  with nothing;
- what `fsdp` sends hides behind the matrix products of the same pass, forward or backward, as far
  as it takes no longer than they do; all else is waited for. A plan for GPUs reads instead from the
  compiled program what runs beside each collective (`hlo_overlap`). Links inside a node and
  between nodes work at the same time;
- a pipeline's blocks are idle for its bubble; what idle ticks send is among what is sent.

`sizes` are the mesh's axis sizes everywhere.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from llamajax.backends import Device
from llamajax.config import RunConfig
from llamajax.models.counts import flops_per_token, matrices_per_layer, num_parameters
from llamajax.models.layer_order import padded_layers
from llamajax.models.lora import num_adapter_parameters
from llamajax.models.memory import (
    FLOAT32_BYTES,
    device_share,
    float8_share,
    weight_width,
    width,
)
from llamajax.models.pipeline import bubble, num_ticks
from llamajax.ops.attention import FUSED, computed_scores
from llamajax.planning.muon_cost import muon_product_flops

# Speed of attention's products relative to large ones: fused kernels (the user's own is taken for
# one), and blocks of plain XLA.
_ATTENTION = {"cudnn": 0.6, "splash": 0.6, "blocked": 0.15, "split": 0.15, "xla": 0.15}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of one step on every device, and the terms that add up to them.

    links_s: by mesh axes, all that they send. hidden_s: how much of it matrix products hide.
    bubble_s: the time of a pipeline's idle ticks.
    """

    products_s: float
    attention_s: float
    memory_s: float
    links_s: dict[str, float]
    hidden_s: float
    bubble_s: float
    step_time_s: float
    tokens_per_s: float
    mfu_full: float
    mfu_causal: float


class TokenFlops(NamedTuple):
    """FLOPs a token by formula, of the model's own layers.

    blocks, scores, head: of the forward pass; scores are the causal half of attention. again,
    scores_again: what the backward pass runs once more. passes: of products with weights, forward
    and backward, in forward passes. filled: layers with those of zeros, which take as long, by the
    model's own.
    """

    blocks: float
    scores: float
    head: float
    again: float
    scores_again: float
    passes: int
    filled: float

    @property
    def step_blocks(self) -> float:
        """Of the blocks' products in a step, layers of zeros included."""
        return self.filled * (self.passes * self.blocks + self.again)

    @property
    def step_head(self) -> float:
        """Of the head's products in a step."""
        return self.passes * self.head


def token_flops(config: RunConfig, sizes: Mapping[str, int]) -> TokenFlops:
    """Count the FLOPs of a step by formula.

    The backward pass needs no block's last product again. A pipeline that keeps only a stage's
    input runs the stage once more, and then what the policy of each block says; where a stage's
    group is a single block, the compiler makes one of the two.
    """
    m, t, seq_len, stages = config.model, config.train, config.data.seq_len, sizes["stage"]
    blocks = 2.0 * m.num_layers * matrices_per_layer(m)
    head = 2.0 * m.vocab_size * m.hidden_size
    scores = flops_per_token(m, seq_len, causal=True) / 3 - blocks - head
    qkv = 2.0 * m.num_layers * m.hidden_size * m.head_size * (m.num_heads + 2 * m.num_kv_heads)
    but_last = blocks - 2.0 * m.num_layers * m.hidden_size * m.intermediate_size
    again, scores_again = {
        "full": (but_last, scores),
        "save_attention": (but_last, 0.0),
        "save_qkv": (but_last - qkv, 0.0),
    }.get(t.remat, (0.0, 0.0))
    if stages > 1 and t.remat_stage:
        if m.num_layers <= stages * t.pipeline_rounds:
            again, scores_again = max(again, but_last), scores
        else:
            again, scores_again = again + blocks, scores_again + scores
    layers = padded_layers(m.num_layers, stages=stages, rounds=t.pipeline_rounds)
    filled, passes = layers / m.num_layers, 2 if config.lora.rank else 3
    return TokenFlops(blocks, scores, head, again, scores_again, passes, filled)


def predict(
    config: RunConfig,
    sizes: Mapping[str, int],
    device: Device,
    links_s: Mapping[tuple[str, ...], float],
    *,
    attention: str,
    waits_s: float | None = None,
) -> Prediction | None:
    """Predict the time of a step; None where the device's peak in this dtype is unknown.

    `links_s` holds the seconds in which a device sends all of a step, by mesh axes; one that is
    infinite makes the prediction None. `waits_s`: how much of it the compiled program waits for, if
    known.
    """
    peak = device.peak(config.train.dtype)
    speeds = compute_seconds(config, sizes, device, attention)
    sent_s = sum(links_s.values())
    if speeds is None or not math.isfinite(sent_s):
        return None
    products_s, attention_s = speeds
    seq_len, devices = config.data.seq_len, math.prod(sizes.values())
    tokens, flops = config.data.global_batch_size * seq_len, token_flops(config, sizes)
    memory_s = memory_bytes(config, sizes) / device.hbm_bytes_per_s
    if waits_s is None:
        fsdp_s = sum(s for axes, s in links_s.items() if "fsdp" in axes)
        hidden_s = _hidden_by_phase(config, flops, fsdp_s, products_s)
    else:
        hidden_s = max(0.0, sent_s - waits_s)
    pipe = pipeline_facts(config, sizes)
    idle = pipe.bubble if pipe else 0.0
    head_s = products_s * flops.step_head / (flops.step_blocks + flops.step_head)  # in no stage
    bubble_s = (products_s - head_s + attention_s) * idle / (1 - idle)
    step_s = products_s + attention_s + memory_s + sent_s - hidden_s + bubble_s
    full, causal = (
        tokens * flops_per_token(config.model, seq_len, causal=causal) / (step_s * peak * devices)
        for causal in (False, True)
    )
    return Prediction(
        products_s=products_s,
        attention_s=attention_s,
        memory_s=memory_s,
        links_s={"+".join(axes): s for axes, s in links_s.items()},
        hidden_s=hidden_s,
        bubble_s=bubble_s,
        step_time_s=step_s,
        tokens_per_s=tokens / step_s,
        mfu_full=full,
        mfu_causal=causal,
    )


def compute_seconds(
    config: RunConfig, sizes: Mapping[str, int], device: Device, attention: str
) -> tuple[float, float] | None:
    """Return the seconds of a step's products with weights, and of its attention.

    None where the device's peak in this dtype is unknown.
    """
    rate, seq_len = device.product_rate(config.train.activation_dtype), config.data.seq_len
    if rate is None:
        return None
    share, flops = _float8_share(config), token_flops(config, sizes)
    slower = 1 - share + share * rate / device.product_rate(config.train.dtype)
    tokens = config.data.global_batch_size * seq_len / math.prod(sizes.values())
    # fused kernels compute the scores once more in their backward pass
    scores = flops.filled * (3.5 * flops.scores + flops.scores_again)
    products = tokens * (slower * flops.step_blocks + flops.step_head)
    products += muon_product_flops(config, sizes)
    return products / rate, tokens * scores / (rate * _ATTENTION.get(attention, 0.6))


def _float8_share(config: RunConfig) -> float:
    """Return the share of the layers' products, by operations, that have operands of 8 bits."""
    products = 1 / 3 if config.train.float8_gradients == "bfloat16" else 1.0
    return products * float8_share(config)


def _hidden_by_phase(
    config: RunConfig, flops: TokenFlops, fsdp_s: float, products_s: float
) -> float:
    """Return the seconds of what `fsdp` sends that products of the same pass hide.

    The forward pass gathers weights in the compute dtype; the backward pass gathers them again and
    scatters gradients in float32.
    """
    gradients = 0 if config.lora.rank else FLOAT32_BYTES / weight_width(config)
    sends_forward = 1 / (2 + gradients)
    forward = flops.filled * flops.blocks + flops.head
    runs_forward = forward / (flops.step_blocks + flops.step_head)
    return min(sends_forward * fsdp_s, runs_forward * products_s) + min(
        (1 - sends_forward) * fsdp_s, (1 - runs_forward) * products_s
    )


def expected_product_flops(
    config: RunConfig, sizes: Mapping[str, int], *, attention: str
) -> float | None:
    """Return the FLOPs of all devices' matrix products in a step's program, a fused kernel's not.

    Recomputation by train.remat counts, and so do Muon's products, layers of zeros, a pipeline's
    idle ticks and the padding of the vocabulary. None where no formula is known for the attention.
    """
    model, train, seq_len = config.model, config.train, config.data.seq_len
    flops, pipe = token_flops(config, sizes), pipeline_facts(config, sizes)
    filled = flops.filled / (1 - pipe.bubble if pipe else 1)
    adapters = num_adapter_parameters(model, config.lora) if config.lora.rank else 0
    adapters *= 6 + 2 * flops.again / flops.blocks
    scores = 0.0
    if attention not in FUSED:
        elements = computed_scores(attention, seq_len, parts=sizes["sequence"])
        if elements is None:
            return None
        # Forward 2, backward 4, and the scores once more unless they are kept or recomputed anyhow.
        products = 6 + 2 * flops.scores_again / flops.scores
        if attention != "xla" or train.remat not in ("none", "full"):
            products += 1
        heads = 2.0 * model.num_layers * model.num_heads * model.head_size
        scores = products * heads * elements / seq_len
    share = device_share(config, sizes)
    rows = share.microbatch * share.tokens / sizes["stage"]
    chunk = min(train.loss_chunk_tokens, rows)
    padding = model.padded_vocab_size / model.vocab_size * math.ceil(rows / chunk) * chunk / rows
    each = filled * (flops.passes * flops.blocks + flops.again + adapters + scores)
    each += padding * flops.step_head
    muon = math.prod(sizes.values()) * muon_product_flops(config, sizes)
    return config.data.global_batch_size * seq_len * each + muon


def memory_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Return the bytes that a device reads and writes besides its matrix products, a step.

    The update reads and writes weights, gradients and two moments; each accumulation step adds to
    the gradients; products read the gathered weights twice or three times, in a pipeline in every
    tick and once more where a stage is recomputed; and a block writes and reads about 12 times the
    residual, 8 times queries, keys and values and 10 times the feed-forward.
    """
    m, share = config.model, device_share(config, sizes)
    held = num_parameters(m) / (sizes["fsdp"] * sizes["tensor"] * sizes["stage"])
    accumulation = config.train.accumulation_steps
    update = held * 7 * FLOAT32_BYTES + held * 2 * FLOAT32_BYTES * accumulation
    layers = m.num_layers / sizes["stage"]
    keeps_products = config.train.remat in ("none", "dots")
    passes, recompute = (2, 1.0) if keeps_products else (3, 4 / 3)
    turns, pipe = accumulation, pipeline_facts(config, sizes)
    if pipe is not None:
        turns *= pipe.microbatches / (1 - pipe.bubble)
        passes += config.train.remat_stage
    weights = matrices_per_layer(m) / sizes["tensor"] * layers * passes * turns
    by_rows = config.train.float8_scaling == "row"  # 5 bytes: two reads in 16 bits, one write
    weights *= weight_width(config) + 5 * by_rows * _float8_share(config)
    heads = (m.num_heads + 2 * m.num_kv_heads) * m.head_size
    values = 12 * m.hidden_size + 8 * heads + 10 * m.intermediate_size
    if float8 := _float8_share(config):  # in the width of an activation, 2 bytes
        update += held * FLOAT32_BYTES  # the scales of weights
        inputs_and_outputs = 4 * m.hidden_size + heads + m.num_heads * m.head_size
        moved = 6 if by_rows else 3.5
        values += float8 * moved * (inputs_and_outputs + 3 * m.intermediate_size)
    tokens = share.rows * share.tokens / sizes["tensor"]
    return update + weights + tokens * values * layers * recompute * width(config)


@dataclasses.dataclass(frozen=True)
class PipelineFacts:
    """A pipeline's idle share, and what it keeps of its microbatches in two ways, bytes a device.

    stage_inputs_bytes: one activation a tick, kept with train.remat_stage; layer_inputs_bytes: one
    a tick and layer, kept without. Outputs that wait for their loss come on top in both.
    """

    stages: int
    microbatches: int
    rounds: int
    bubble: float
    stage_inputs_bytes: float
    layer_inputs_bytes: float


def pipeline_facts(config: RunConfig, sizes: Mapping[str, int]) -> PipelineFacts | None:
    """Return the pipeline of a run; None where there is none."""
    m, t, share = config.model, config.train, device_share(config, sizes)
    stages, rounds = sizes["stage"], t.pipeline_rounds
    if stages == 1:
        return None
    microbatches = share.microbatch // t.microbatch_size
    schedule = {"stages": stages, "microbatches": microbatches, "rounds": rounds}
    tokens = t.microbatch_size * share.tokens / sizes["tensor"]
    kept = num_ticks(**schedule) * tokens * m.hidden_size * width(config)
    layers = padded_layers(m.num_layers, stages=stages, rounds=rounds) // (stages * rounds)
    return PipelineFacts(
        **schedule,
        bubble=bubble(**schedule),
        stage_inputs_bytes=kept,
        layer_inputs_bytes=kept * layers,
    )


def link_seconds(sent: float, slow: float, device: Device) -> float:
    """Return the seconds in which a device sends so many bytes, of which `slow` go to other nodes.

    Infinite where the table does not say how fast those are.
    """
    if slow and device.slow_bytes_per_s is None:
        return math.inf
    return max(sent / device.fast_bytes_per_s, slow and slow / device.slow_bytes_per_s)
