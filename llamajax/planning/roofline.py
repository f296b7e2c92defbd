"""How long a step takes, from its operations, its memory traffic and what it sends: a roofline.

What no compiler says is estimated here with figures of the device table. Assumptions, all of them:

- matrix products run at `Device.efficiency` of the peak, attention's at a part of that which
  depends on the kernel; recomputation is counted, and only the causal half of attention;
- element-wise work and the optimizer are bound by the bandwidth of the device's memory and hide
  behind nothing;
- what `fsdp` sends hides behind the matrix products as far as it takes no longer than they do; all
  else is waited for; links inside a node and between nodes work at the same time;
- a pipeline's blocks stand still for its bubble; what idle ticks send is among what is sent.
"""

import dataclasses
import math
from collections.abc import Mapping

from llamajax.backends import Device
from llamajax.config import ModelConfig, RunConfig
from llamajax.models.counts import flops_per_token, num_parameters
from llamajax.models.order import padded_layers
from llamajax.models.pipeline import bubble, num_ticks

# Speed of attention's products relative to large ones: fused kernels, and blocks of plain XLA.
_ATTENTION = {"cudnn": 0.6, "splash": 0.6, "blocked": 0.15, "split": 0.15, "xla": 0.15}
_SINGLE = 4  # bytes of a value in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of one step on every device, and the terms that add up to them.

    links_s: by mesh axes, all that they send. hidden_s: how much of it matrix products hide.
    bubble: share of its ticks in which a stage has nothing to do; bubble_s: the time of these.
    """

    products_s: float
    attention_s: float
    memory_s: float
    links_s: dict[str, float]
    hidden_s: float
    bubble: float
    bubble_s: float
    step_time_s: float
    tokens_per_s: float
    mfu_full: float
    mfu_causal: float


@dataclasses.dataclass(frozen=True)
class Shares:
    """What one device has of a step: rows at a time, rows a step, tokens of a row, and parts."""

    sizes: Mapping[str, int]
    rows: int
    microbatch: int
    tokens: float

    @classmethod
    def of(cls, config: RunConfig, sizes: Mapping[str, int]) -> "Shares":
        """The shares of a run on a mesh of these axis sizes."""
        rows = config.data.global_batch_size // (sizes["data"] * sizes["fsdp"])
        at_a_time = rows // config.train.accumulation_steps
        return cls(sizes, rows, at_a_time, config.data.seq_len / sizes["sequence"])

    @property
    def weights(self) -> int:
        """Parts of a matrix in a block, all layers."""
        return self.sizes["fsdp"] * self.sizes["tensor"] * self.sizes["stage"]


def predict(
    config: RunConfig,
    sizes: Mapping[str, int],
    device: Device,
    links_s: Mapping[tuple[str, ...], float | None],
    *,
    attention: str,
) -> Prediction | None:
    """The step's time on a mesh of `sizes`; None where the device's peak in this dtype is unknown.

    `links_s` holds the seconds in which a device sends all of a step, by mesh axes; None among them
    makes the prediction None.
    """
    peak = getattr(device, config.train.dtype)
    if peak is None or None in links_s.values():
        return None
    c, model, devices = config.data, config.model, math.prod(sizes.values())
    tokens = c.global_batch_size * c.seq_len
    forward = _forward_flops(model, c.seq_len)
    recomputed = _recomputed_flops(config, sizes)
    layers = padded_layers(
        model.num_layers, stages=sizes["stage"], rounds=config.train.pipeline_rounds
    )
    filled = layers / model.num_layers  # layers of zeros take as long as others
    trained = 2 if config.lora.rank else 3
    blocks, scores, head = (
        filled * (trained * forward["blocks"] + recomputed["blocks"]),
        # fused kernels compute the scores once more in their backward pass
        filled * (3.5 * forward["scores"] + recomputed["scores"]),
        trained * forward["head"],
    )
    rate = peak * device.efficiency
    products_s = tokens * (blocks + head) / devices / rate
    attention_s = tokens * scores / devices / (rate * _ATTENTION[attention])
    memory_s = memory_bytes(config, sizes) / device.hbm_bytes_per_s
    hideable_s = sum(s for axes, s in links_s.items() if "fsdp" in axes)
    hidden_s = min(hideable_s, products_s)
    idle = _bubble(config, sizes)
    stage_s = tokens * blocks / devices / rate + attention_s  # head and loss are in no stage
    bubble_s = stage_s * idle / (1 - idle)
    step_s = products_s + attention_s + memory_s + sum(links_s.values()) - hidden_s + bubble_s
    mfu = {
        causal: tokens
        * flops_per_token(model, c.seq_len, causal=causal)
        / (step_s * peak * devices)
        for causal in (False, True)
    }
    return Prediction(
        products_s=products_s,
        attention_s=attention_s,
        memory_s=memory_s,
        links_s={"+".join(axes): s for axes, s in links_s.items()},
        hidden_s=hidden_s,
        bubble=idle,
        bubble_s=bubble_s,
        step_time_s=step_s,
        tokens_per_s=tokens / step_s,
        mfu_full=mfu[False],
        mfu_causal=mfu[True],
    )


def memory_bytes(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Bytes that a device reads and writes besides its matrix products, a step.

    The update reads and writes weights, gradients and two moments; each accumulation step adds to
    the gradients; products read the gathered weights twice or three times, in a pipeline in every
    tick and once more where a stage is recomputed; and a block writes and reads about 12 times the
    residual, 8 times queries, keys and values and 10 times the feed-forward.
    """
    m, share = config.model, Shares.of(config, sizes)
    held = num_parameters(m) / share.weights
    accumulation = config.train.accumulation_steps
    update = held * 7 * _SINGLE + held * 2 * _SINGLE * accumulation
    layers = m.num_layers / sizes["stage"]
    passes = 2 if config.train.remat in ("none", "dots") else 3
    turns, pipe = accumulation, pipeline_facts(config, sizes)
    if pipe is not None:
        turns *= pipe.microbatches / (1 - pipe.bubble)
        passes += config.train.remat_stage
    weights = matrices_per_layer(m) / sizes["tensor"] * layers * passes * turns * width(config)
    heads = (m.num_heads + 2 * m.num_kv_heads) * m.head_size
    values = 12 * m.hidden_size + 8 * heads + 10 * m.intermediate_size
    recompute = 1.0 if config.train.remat in ("none", "dots") else 4 / 3
    tokens = share.rows * share.tokens / sizes["tensor"]
    return update + weights + tokens * values * layers * recompute * width(config)


def width(config: RunConfig) -> int:
    """Bytes of a value in the compute dtype."""
    return 2 if config.train.dtype == "bfloat16" else _SINGLE


def matrices_per_layer(model: ModelConfig) -> int:
    """Number of weights in the matrices of one block."""
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_size
    return model.hidden_size * (heads + 3 * model.intermediate_size)


def _forward_flops(model: ModelConfig, seq_len: int) -> dict[str, float]:
    """Operations of the forward pass a token: products with weights, causal scores, head."""
    blocks = 2.0 * model.num_layers * matrices_per_layer(model)
    head = 2.0 * model.vocab_size * model.hidden_size
    return {
        "blocks": blocks,
        "head": head,
        "scores": flops_per_token(model, seq_len, causal=True) / 3 - blocks - head,
    }


def _recomputed_flops(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, float]:
    """Operations of the forward pass that the backward pass runs again.

    Nothing needs a block's last product again. A pipeline that keeps a stage's input alone runs the
    stage once more, and then what the policy of each block says; where a stage's group is a single
    block, the compiler makes one of the two.
    """
    model, train = config.model, config.train
    forward = _forward_flops(model, config.data.seq_len)
    attention = 2.0 * model.num_layers * model.hidden_size * model.head_size
    qkv = attention * (model.num_heads + 2 * model.num_kv_heads)
    last = 2.0 * model.num_layers * model.hidden_size * model.intermediate_size
    blocks, scores = {
        "full": (forward["blocks"] - last, forward["scores"]),
        "save_attention": (forward["blocks"] - last, 0.0),
        "save_qkv": (forward["blocks"] - last - qkv, 0.0),
    }.get(train.remat, (0.0, 0.0))
    if sizes["stage"] > 1 and train.remat_stage:
        if model.num_layers <= sizes["stage"] * train.pipeline_rounds:
            return {"blocks": max(blocks, forward["blocks"] - last), "scores": forward["scores"]}
        return {"blocks": blocks + forward["blocks"], "scores": scores + forward["scores"]}
    return {"blocks": blocks, "scores": scores}


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
    """The pipeline of a run on a mesh of these axis sizes; None where there is none."""
    t, share = config.train, Shares.of(config, sizes)
    if sizes["stage"] == 1:
        return None
    schedule = {
        "stages": sizes["stage"],
        "microbatches": share.microbatch // t.microbatch_size,
        "rounds": t.pipeline_rounds,
    }
    tokens = t.microbatch_size * share.tokens / sizes["tensor"]
    kept = num_ticks(**schedule) * tokens * config.model.hidden_size * width(config)
    layers = padded_layers(
        config.model.num_layers, stages=sizes["stage"], rounds=t.pipeline_rounds
    ) // (sizes["stage"] * t.pipeline_rounds)
    return PipelineFacts(
        **schedule,
        bubble=bubble(**schedule),
        stage_inputs_bytes=kept,
        layer_inputs_bytes=kept * layers,
    )


def _bubble(config: RunConfig, sizes: Mapping[str, int]) -> float:
    facts = pipeline_facts(config, sizes)
    return facts.bubble if facts else 0.0


def link_seconds(sent: float, slow: float, device: Device) -> float | None:
    """Seconds in which a device sends so many bytes, of which `slow` go to other nodes.

    None where the table does not say how fast those are.
    """
    if slow == 0:
        return sent / device.fast_bytes_per_s
    if device.slow_bytes_per_s is None:
        return None
    return max(sent / device.fast_bytes_per_s, slow / device.slow_bytes_per_s)
