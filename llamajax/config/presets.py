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


def _scaled(factor: float) -> RopeScaling:
    return RopeScaling(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
    )


_USUAL = {"norm_eps": 1e-5, "tie_embeddings": False, "init_std": 0.02}
_LLAMA2 = _USUAL | {"vocab_size": 32_000, "rope_theta": 10_000.0, "max_seq_len": 4096}
_LLAMA3 = _USUAL | {"vocab_size": 128_256, "rope_theta": 500_000.0, "max_seq_len": 8192}
_LLAMA3_1 = _LLAMA3 | {"rope_scaling": _scaled(8.0), "max_seq_len": 131_072}
_LLAMA3_2 = _LLAMA3_1 | {"rope_scaling": _scaled(32.0), "tie_embeddings": True}
_SMOLLM2 = {"vocab_size": 49_152, "rope_theta": 100_000.0, "max_seq_len": 8192}
_SMOLLM2 |= {"norm_eps": 1e-5, "tie_embeddings": True, "init_std": 1 / 24}
_TINY = {"vocab_size": 101, "rope_theta": 12_345.0, "max_seq_len": 128}
_TINY |= {"norm_eps": 3e-5, "tie_embeddings": False, "init_std": 0.05}

_SIZES = (
    "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_size",
)  # fmt: skip
# fmt: off
_ROWS = [
    # name                D       F    L    N   K    H
    ("llama2-7b",      4096, 11_008,  32,  32, 32, 128, _LLAMA2),
    ("llama2-13b",     5120, 13_824,  40,  40, 40, 128, _LLAMA2),
    ("llama2-70b",     8192, 28_672,  80,  64,  8, 128, _LLAMA2),
    ("llama3-8b",      4096, 14_336,  32,  32,  8, 128, _LLAMA3),
    ("llama3-70b",     8192, 28_672,  80,  64,  8, 128, _LLAMA3),
    ("llama3.1-8b",    4096, 14_336,  32,  32,  8, 128, _LLAMA3_1),
    ("llama3.1-70b",   8192, 28_672,  80,  64,  8, 128, _LLAMA3_1),
    ("llama3.1-405b", 16_384, 53_248, 126, 128, 8, 128, _LLAMA3_1),
    ("llama3.2-1b",    2048,   8192,  16,  32,  8,  64, _LLAMA3_2),
    ("llama3.2-3b",    3072,   8192,  28,  24,  8, 128, _LLAMA3_2),
    ("smollm2-135m",    576,   1536,  30,   9,  3,  64, _SMOLLM2),
    # The workload that peers were measured with on a 2-core CPU: 32.0 M parameters.
    ("bench-32m",       512,   1408,   8,   8,  4,  64,
     _LLAMA2 | {"vocab_size": 8192, "max_seq_len": 2048}),
    # A first run on two CPU cores: 5 M parameters, a tokenizer of 4,096 pieces.
    ("quickstart",      256,    704,   4,   4,  2,  64,
     _LLAMA2 | {"vocab_size": 4096, "max_seq_len": 1024}),
    # For tests: nobody's defaults, N * H != D, three query heads a kv head, a prime vocabulary.
    ("tiny",             48,     88,   3,   6,  2,  10, _TINY),
]
# fmt: on

PRESETS: dict[str, ModelConfig] = {
    name: ModelConfig(name=name, **dict(zip(_SIZES, sizes, strict=True)), **rest)
    for name, *sizes, rest in _ROWS
}


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
