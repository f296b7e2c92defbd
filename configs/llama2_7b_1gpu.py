"""Llama-2 7B pretrained on one GPU of 141 GB: the run of `llama2_7b.py`, without its other devices.

Hardware: one NVIDIA H200. Planned (`llamajax plan`, jax 0.12, 2026-11-30): 126.3 of the 129.7 GiB
          that a program may take there; a save copies 75.3 GiB of state to the host's memory.
Command:  python -m llamajax.prepare --input='text/*.jsonl' --tokenizer=llama2.model \
              --output=data/llama2
          python -m llamajax.train --config=configs/llama2_7b_1gpu.py \
              --workdir=runs/llama2_7b_1gpu --config.data.path=data/llama2
Speed:    planned for h200:1, not run: 13,168 tokens/s, 19.9 s a step, with products at 66 % of the
          peak. A single H200 with full recomputation elsewhere: 10,471 tokens/s (KempnerForge).
          With `--config.train.dtype=float8` (docs/float8.md) planned at 17,742 tokens/s, 14.8 s a
          step, in the same 126.3 GiB.
Loss:     unmeasured.

The batch, the optimizer and the schedule are those of `llama2_7b.py`: 64 sequences of 4096 tokens a
step. Here they pass in 32 microbatches of 2. Each adds its gradient to one sum in place: weights,
both moments and the gradient take 100.5 GiB in float32, and a second gradient would not fit.
"""

from ml_collections import ConfigDict

from llamajax.configs.llama2_7b import get_config as llama2_7b


def get_config() -> ConfigDict:
    """The run."""
    config = llama2_7b()
    config.mesh.fsdp = 1
    config.train.accumulation_steps = 32
    return config
