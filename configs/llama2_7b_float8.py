"""Llama-2 7B on 8 devices with the layers' products in 8 bits: the run of `llama2_7b.py`, faster.

Hardware: 8 NVIDIA H100 or newer. Chips without 8-bit products round to them and gain nothing. One
          H200 holds it as well, with `llama2_7b_1gpu.py` and `--config.train.dtype=float8`.
Command:  python -m llamajax.train --config=configs/llama2_7b_float8.py --workdir=runs/7b_float8 \
              --config.data.path=data/llama2
Speed:    planned (`llamajax plan`, jax 0.12, 2026-11-30), not run: for h100:8 15,442 tokens/s a
          device in 44.5 of 72.8 GiB, beside 12,945 in bfloat16; on one H200 17,742, beside 13,168.
Loss:     unmeasured; docs/float8.md says what 8 bits cost a small model.

All else is as there, and a checkpoint of the one resumes in the other.
"""

from ml_collections import ConfigDict

from llamajax.configs.llama2_7b import get_config as llama2_7b


def get_config() -> ConfigDict:
    """The run."""
    config = llama2_7b()
    config.train.dtype = "float8"
    return config
