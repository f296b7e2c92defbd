"""Llama-2 7B on 8 devices with the layers' products in 8 bits: the run of `llama2_7b.py`, faster.

Hardware: 8 NVIDIA H100 or newer. Chips without 8-bit products round to them and gain nothing. One
          H200 does not hold it yet: with the mesh and the 32 microbatches of `llama2_7b_1gpu.py` it
          is planned (jax 0.12, 2026-11-30) at 150.3 of 129.7 GiB, bfloat16 at 126.3.
Command:  python -m llamajax.train --config=configs/llama2_7b_float8.py --workdir=runs/7b_float8 \
              --config.data.path=data/llama2
Speed:    unmeasured; not planned on 8 devices. On one H200 planned at 17,742 tokens/s, beside
          13,168 in bfloat16, if it had the memory.
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
