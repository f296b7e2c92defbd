"""Llama-2 7B finetuned on 8 devices, all its weights.

Hardware: 8 accelerators of 40 GB or more in one node, which share weights, gradients and optimizer
          state. Planned (`llamajax plan`, jax 0.12, 2026-11-30) for h100:8: 32.8 GiB a device.
Command:  python -m llamajax.prepare --input='text/*.jsonl' --tokenizer=hf/llama2_7b \
              --output=data/finetune
          python -m llamajax.train --config=configs/llama2_7b_finetune.py \
              --workdir=runs/llama2_7b_finetune --config.train.init_from=hf/llama2_7b \
              --config.data.path=data/finetune
Start:    a Hugging Face directory of Llama-2 7B, or any checkpoint of that architecture.
Batch:    64 sequences of 4096: 262,144 tokens a step. Set --config.train.steps to two or three
          readings of your text.
Export:   runs/llama2_7b_finetune/hf/STEP, every 200 steps and at the end.
Speed:    planned for h100:8, not run: 11,964 tokens/s a device.
Loss:     unmeasured; depends on the text.

A low learning rate (Llama 2 was finetuned with 2e-5, arXiv:2307.09288, section 3.1) and a short
warm-up keep what the model knows. Adam's moments are fp32; bfloat16 weights would lose such small
updates, so the masters are fp32 as in pretraining.
"""

from ml_collections import ConfigDict

from llamajax.configs.llama2_7b import get_config as llama2_7b


def get_config() -> ConfigDict:
    """The run."""
    config = llama2_7b()
    config.data.path = "data/finetune"

    config.train.init_from = "hf/llama2_7b"
    config.train.accumulation_steps = 8
    config.train.eval_every = 100

    config.optim.learning_rate = 2e-5
    config.optim.weight_decay = 0.1

    config.checkpoint.keep = 2
    config.checkpoint.export_hf_every = 200
    return config
