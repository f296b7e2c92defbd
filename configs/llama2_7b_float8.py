"""Llama-2 7B of `llama2_7b.py` with the layers' products in 8 bits, on one H200 or on 8 devices.

Hardware: one NVIDIA H200 (or 8 H100 or newer). Other chips round to 8 bits and gain nothing.
Command:  python -m llamajax.train --config=configs/llama2_7b_float8.py --workdir=runs/7b_float8 \
              --config.data.path=data/llama2
          8 devices: --config.mesh.fsdp=8 --config.train.accumulation_steps=4
          For bfloat16 beside it: --config.train.dtype=bfloat16
Speed:    {speed}
Loss:     unmeasured; docs/float8.md says what 8 bits cost a small model.

Weights, moments and their updates are those of `llama2_7b.py`, and a checkpoint of the one resumes
in the other.
"""

from ml_collections import ConfigDict

from llamajax.configs.llama2_7b_1gpu import get_config as llama2_7b_1gpu


def get_config() -> ConfigDict:
    """The run."""
    config = llama2_7b_1gpu()
    config.train.dtype = "float8"
    return config
