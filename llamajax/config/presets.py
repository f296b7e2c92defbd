"""Published Llama architectures, and small ones of our own for tests and first runs.

Each number is that of the publisher's `config.json`; `tests/contracts/test_presets.py` holds the
published parameter counts. A preset is the `model` section of a run and nothing else.
"""

import dataclasses
from typing import TYPE_CHECKING

from llamajax.config.model_schema import ModelConfig, RopeScaling
from llamajax.errors import UserError, did_you_mean, nearest

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_LLAMA2 = ModelConfig(
    name="llama2-7b",
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_size=128,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    init_std=0.02,
    max_seq_len=4096,
)
_LLAMA3 = dataclasses.replace(
    _LLAMA2,
    name="llama3-8b",
    vocab_size=128_256,
    intermediate_size=14_336,
    num_kv_heads=8,
    rope_theta=500_000.0,
    max_seq_len=8192,
)
_LLAMA3_1 = dataclasses.replace(
    _LLAMA3,
    name="llama3.1-8b",
    rope_scaling=RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
    ),
    max_seq_len=131_072,
)
_LLAMA3_2 = dataclasses.replace(
    _LLAMA3_1,
    name="llama3.2-1b",
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    head_size=64,
    rope_scaling=RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
    ),
    tie_embeddings=True,
)
_SIZE_70B = {"hidden_size": 8192, "intermediate_size": 28_672, "num_layers": 80, "num_heads": 64}

_ALL = [
    _LLAMA2,
    dataclasses.replace(
        _LLAMA2,
        name="llama2-13b",
        hidden_size=5120,
        intermediate_size=13_824,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
    ),
    dataclasses.replace(_LLAMA2, name="llama2-70b", num_kv_heads=8, **_SIZE_70B),
    _LLAMA3,
    dataclasses.replace(_LLAMA3, name="llama3-70b", **_SIZE_70B),
    _LLAMA3_1,
    dataclasses.replace(_LLAMA3_1, name="llama3.1-70b", **_SIZE_70B),
    dataclasses.replace(
        _LLAMA3_1,
        name="llama3.1-405b",
        hidden_size=16_384,
        intermediate_size=53_248,
        num_layers=126,
        num_heads=128,
    ),
    _LLAMA3_2,
    dataclasses.replace(
        _LLAMA3_2,
        name="llama3.2-3b",
        hidden_size=3072,
        num_layers=28,
        num_heads=24,
        head_size=128,
    ),
    ModelConfig(
        name="smollm2-135m",
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_size=64,
        rope_theta=100_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        init_std=1 / 24,
        max_seq_len=8192,
    ),
    # The workload that peers were measured with on a 2-core CPU: 32.0 M parameters.
    dataclasses.replace(
        _LLAMA2,
        name="bench-32m",
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        head_size=64,
        max_seq_len=2048,
    ),
    # A first run on two CPU cores: 5 M parameters, a tokenizer of 4,096 pieces.
    dataclasses.replace(
        _LLAMA2,
        name="quickstart",
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_size=64,
        max_seq_len=1024,
    ),
    # For tests: nobody's defaults, N * H != D, three query heads a kv head, a prime vocabulary.
    ModelConfig(
        name="tiny",
        vocab_size=101,
        hidden_size=48,
        intermediate_size=88,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_size=10,
        rope_theta=12_345.0,
        norm_eps=3e-5,
        tie_embeddings=False,
        init_std=0.05,
        max_seq_len=128,
    ),
]

PRESETS: dict[str, ModelConfig] = {model.name: model for model in _ALL}


def find_preset(name: str) -> ModelConfig:
    """Return a published architecture.

    Raises:
        UserError: there is no such preset; the message names the nearest and lists all.
    """
    if name not in PRESETS:
        hint = did_you_mean(nearest(str(name), PRESETS)) or "."
        raise UserError(f"unknown preset {name!r}{hint} Presets: {', '.join(PRESETS)}")
    return PRESETS[name]


def preset(name: str) -> "ConfigDict":
    """Return the `model` section of `find_preset`, free to be changed by the caller."""
    from ml_collections import ConfigDict

    return ConfigDict(dataclasses.asdict(find_preset(name)), type_safe=False)
