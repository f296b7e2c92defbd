"""The small Llamas that tests compare with transformers: architectures, weights and tokens.

Weights and tokens come from a seed, so only what transformers and PyTorch compute from them is
stored (see write_references.py). Nothing here needs either of the two.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from tiny_model import tiny_model, tiny_optim

from llamajax.config.model_schema import ModelConfig, RopeScaling

LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)
LLAMA31 = dataclasses.replace(LLAMA3, original_max_seq_len=8192)
LINEAR = RopeScaling(type="linear", factor=2.5)
# Of 8 pairs, yarn keeps 1, blends 2, and divides the rest; the other one keeps 2 and blends 3.
YARN = RopeScaling(type="yarn", factor=4.0, original_max_seq_len=128)
OTHER_YARN = dataclasses.replace(
    YARN, beta_fast=4.0, beta_slow=0.5, attention_factor=1.375, truncate=False
)

# Logits, gradients and updates.
GROUPED = tiny_model(hidden_size=24, intermediate_size=52, num_layers=3, head_size=6, init_std=0.1)
TRAINED = {
    "grouped": GROUPED,
    "tied": dataclasses.replace(GROUPED, tie_embeddings=True),
    "llama3 rope": dataclasses.replace(GROUPED, rope_scaling=LLAMA3, rope_theta=12_345.0),
    "wide heads": dataclasses.replace(GROUPED, head_size=14, num_kv_heads=4, norm_eps=1e-3),
    "odd sizes": dataclasses.replace(
        GROUPED, hidden_size=33, num_heads=3, num_kv_heads=1, intermediate_size=55, num_layers=1
    ),
    "whole rows of 128": dataclasses.replace(GROUPED, vocab_size=128),
}
STEPS = 50
UPDATES = tiny_optim(
    learning_rate=3e-3, warmup_steps=5, schedule="cosine", final_learning_rate=3e-4
)

# Greedy decoding: weights large enough that the text is no repetition of one token.
DECODED_BASE = dataclasses.replace(GROUPED, num_layers=2, init_std=0.3, max_seq_len=96)
DECODED = {
    "tied": dataclasses.replace(DECODED_BASE, tie_embeddings=True),
    "llama3 rope": dataclasses.replace(DECODED_BASE, rope_scaling=LLAMA3, rope_theta=12_345.0),
}
# Adapters of PEFT on STORED["plain"].
ADAPTED: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "rslora": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["k_proj", "down_proj"],
        "use_rslora": True,
        "fan_in_fan_out": True,  # which PEFT sets to false for a Llama
    },
    "patterns": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "gate_proj", "up_proj"],
        "rank_pattern": {"1.self_attn.q_proj": 2, "up_proj": 5},
        "alpha_pattern": {r"layers\.0\.mlp\..*": 20.0},
        "modules_to_save": ["lm_head"],
    },
}
PROMPTS = dict(enumerate([[1, 2, 3], [*range(7, 29)], [96], [5, 5, 5, 5, 9], [*range(40, 57)]]))
NEW_TOKENS = 30

# The verb evaluate, with a tokenizer of 256 bytes, BOS and EOS.
CONTEXT = 64
BYTES = {"vocab_size": 258, "max_seq_len": CONTEXT, "init_std": 0.2}
EVALUATED = {"grouped": tiny_model(hidden_size=32, intermediate_size=44, head_size=6, **BYTES)}
EVALUATED["does not divide"] = dataclasses.replace(
    EVALUATED["grouped"], hidden_size=36, num_kv_heads=4, tie_embeddings=True
)
ROWS = ((5, 33), (CONTEXT,))
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely — I went to sea.\n" * 3
PROTOCOLS = {"sliding_window": (32, 13), "non_overlapping": (24, None)}  # length, stride

# Logits of stored weights: GGUF, Meta's files, Hugging Face directories.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_size": 16}
PLAIN = tiny_model(**SIZES, rope_theta=12_345.0, norm_eps=3e-5, init_std=0.02)
LONG = {"rope_theta": 500_000.0, "max_seq_len": 131_072}
LLAMA32 = dataclasses.replace(LLAMA31, factor=32.0)
# Two whole directories of the small one are stored as PyTorch and transformers write them.
SMALL = {"vocab_size": 34, "hidden_size": 16, "intermediate_size": 24, "head_size": 4}
STORED = {
    "plain": PLAIN,
    "even": dataclasses.replace(PLAIN, vocab_size=98),
    "tied": dataclasses.replace(PLAIN, tie_embeddings=True),
    "llama31": dataclasses.replace(PLAIN, rope_scaling=LLAMA31, **LONG),
    "llama32": dataclasses.replace(PLAIN, rope_scaling=LLAMA32, tie_embeddings=True, **LONG),
    "small": dataclasses.replace(PLAIN, rope_scaling=LLAMA31, **SMALL, **LONG),
    "linear": dataclasses.replace(PLAIN, rope_scaling=LINEAR),
    "yarn": dataclasses.replace(PLAIN, rope_scaling=YARN),
    "other yarn": dataclasses.replace(PLAIN, rope_scaling=OTHER_YARN),
}

# Keys of a config.json with the sizes of PLAIN, and the scaling that they mean.
OLD_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
ROPES: dict[str, tuple[dict[str, Any], RopeScaling | None]] = {
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.5}}, LINEAR),
    "linear by 1": ({"rope_scaling": {"type": "linear", "factor": 1}}, None),
    "yarn": ({"rope_scaling": OLD_ROPE}, YARN),
    "yarn, all keys": (
        {
            "rope_parameters": OLD_ROPE
            | {"beta_fast": 4, "beta_slow": 0.5, "attention_factor": 1.375, "truncate": False}
        },
        OTHER_YARN,
    ),
    "yarn, mscale": (
        {"rope_scaling": OLD_ROPE | {"mscale": 0.75, "mscale_all_dim": 2.0}},
        dataclasses.replace(YARN, attention_factor=0.8643291513502996),
    ),
    "yarn, original length beside it": (
        {"rope_scaling": OLD_ROPE, "original_max_position_embeddings": 1024},
        dataclasses.replace(YARN, original_max_seq_len=1024),
    ),
    "yarn by the ratio of lengths": (
        {"rope_parameters": OLD_ROPE | {"factor": None}, "max_position_embeddings": 640},
        dataclasses.replace(YARN, factor=5.0),
    ),
}  # fmt: skip
ROPE_POSITIONS = np.array([[0, 1, 2, 3, 17, 100, 127]], np.int32)


class Draw:
    """Random arrays from the bits of Philox, which stay the same with every version of NumPy."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=seed)

    def integers(self, low: int, high: int, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Integers in low .. high - 1."""
        raw = self._bits.random_raw(int(np.prod(shape, dtype=int)))
        return (low + (raw % np.uint64(high - low)).astype(np.int64)).reshape(shape)

    def uniform(self, shape: tuple[int, ...], *, mean: float, std: float) -> np.ndarray:
        """Float32 values, uniform about the mean."""
        raw = self._bits.random_raw(int(np.prod(shape)))
        unit = (raw >> np.uint64(11)).astype(np.float64) / 2**53
        return (mean + (unit - 0.5) * (std * 12**0.5)).astype(np.float32).reshape(shape)


def random_config(seed: int) -> ModelConfig:
    """Draw every size of an architecture, and whether it is tied and scaled."""
    draw = Draw(400 + seed)
    kv_heads = int(draw.integers(1, 4))
    heads = kv_heads * int(draw.integers(1, 4))
    return dataclasses.replace(
        GROUPED,
        vocab_size=int(draw.integers(50, 290)),
        hidden_size=heads * int(draw.integers(3, 8)),  # transformers wants a multiple
        intermediate_size=int(draw.integers(9, 70)),
        num_layers=int(draw.integers(1, 4)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=2 * int(draw.integers(1, 8)),
        rope_theta=float(draw.integers(1_000, 1_000_000)),
        rope_scaling=LLAMA3 if draw.integers(0, 2) else None,
        tie_embeddings=bool(draw.integers(0, 2)),
    )


STORED |= {f"random {seed}": random_config(seed) for seed in range(6)}


def shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a Hugging Face Llama by its name."""
    V, D, F = c.vocab_size, c.hidden_size, c.intermediate_size
    Q, K = c.num_heads * c.head_size, c.num_kv_heads * c.head_size
    layer = {
        "input_layernorm": (D,),
        "self_attn.q_proj": (Q, D),
        "self_attn.k_proj": (K, D),
        "self_attn.v_proj": (K, D),
        "self_attn.o_proj": (D, Q),
        "post_attention_layernorm": (D,),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for i in range(c.num_layers):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    found["model.norm.weight"] = (D,)
    return found if c.tie_embeddings else found | {"lm_head.weight": (V, D)}


def weights(c: ModelConfig, *, std: float = 0.1) -> dict[str, np.ndarray]:
    """Weights under Hugging Face's names; the scales of norms are about one."""
    draw = Draw(0)
    return {
        name: draw.uniform(shape, mean=float(len(shape) == 1), std=std)
        for name, shape in shapes(c).items()
    }


def tokens(c: ModelConfig, shape: tuple[int, ...] = (2, 13)) -> np.ndarray:
    """Random token ids."""
    return Draw(1).integers(0, c.vocab_size, shape)


def rope_config(name: str) -> dict[str, Any]:
    """The config.json of a case of ROPES."""
    config = hugging_face_config(PLAIN) | {"rope_theta": PLAIN.rope_theta, "model_type": "llama"}
    return {k: v for k, v in config.items() if k != "rope_parameters"} | ROPES[name][0]


def hugging_face_config(c: ModelConfig) -> dict[str, Any]:
    """The architecture in the keys of transformers' LlamaConfig."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if s := c.rope_scaling:
        rope |= {"rope_type": s.type, "factor": s.factor}
        if s.type == "llama3":
            rope |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
        if s.type == "yarn":
            rope |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
        if s.attention_factor is not None:
            rope |= {"attention_factor": s.attention_factor, "truncate": s.truncate}
        if s.type != "linear":
            rope |= {"original_max_position_embeddings": s.original_max_seq_len}
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_size,
        "rope_parameters": rope,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "initializer_range": c.init_std,
        "max_position_embeddings": c.max_seq_len,
    }


def save_peft(folder: Path, c: ModelConfig, config: dict[str, Any], base: Path) -> Path:
    """Write adapters as PEFT does: for each layer and target, and a head of their own if asked."""
    draw, arrays = Draw(7), {}
    for name, (rows, columns) in ((n, s) for n, s in shapes(c).items() if len(s) == 2):
        module = name.removesuffix(".weight")
        if module in config.get("modules_to_save", ()):
            arrays[name] = draw.uniform((rows, columns), mean=0.0, std=0.2)
        if module.split(".")[-1] not in config["target_modules"]:
            continue
        ranks = [r for end, r in config.get("rank_pattern", {}).items() if module.endswith(end)]
        rank = ranks[0] if ranks else config["r"]
        arrays[f"{module}.lora_A.weight"] = draw.uniform((rank, columns), mean=0.0, std=0.3)
        arrays[f"{module}.lora_B.weight"] = draw.uniform((rows, rank), mean=0.0, std=0.3)
    folder.mkdir(exist_ok=True)
    arrays = {f"base_model.model.{name}": array for name, array in arrays.items()}
    safetensors.numpy.save_file(arrays, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def save_hugging_face(folder: Path, c: ModelConfig, arrays: dict[str, np.ndarray]) -> Path:
    """Write a Hugging Face directory with the library safetensors."""
    folder.mkdir(exist_ok=True)
    config = hugging_face_config(c) | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return folder
