"""Llama-2 7B on one GPU of 141 GB with the layers' products in 8 bits: `llama2_7b_1gpu.py` faster.

Hardware: one NVIDIA H200 or newer. Chips without 8-bit products round to them and gain nothing.
          Its memory is not planned yet; that of bfloat16 is 125.9 of 129.7 GiB.
Command:  python -m llamajax.train --config=configs/llama2_7b_float8.py --workdir=runs/7b_float8 \
              --config.data.path=data/llama2
Speed:    predicted for h200:1 by formula, not compiled or run: 17,742 tokens/s, beside 13,168 with
          --config.train.dtype=bfloat16.
Loss:     unmeasured; docs/float8.md says what 8 bits cost a small model.

All else is as there, and a checkpoint of the one resumes in the other.
"""

from ml_collections import ConfigDict

from llamajax.configs.llama2_7b_1gpu import get_config as llama2_7b_1gpu


def get_config() -> ConfigDict:
    """The run."""
    config = llama2_7b_1gpu()
    config.train.dtype = "float8"
    return config
