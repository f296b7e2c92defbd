"""Llama-2 7B with low-rank adapters on one accelerator, its weights frozen in bfloat16.

Hardware: one accelerator of 80 GB: 12.7 GiB of frozen weights, 0.6 of adapters (40 M weights) with
          gradients and optimizer state, and activations. Planned (`llamajax plan`, jax 0.12,
          2026-11-30) for h100:1: 38.1 of 72.8 GiB. For one of 40 GB set
          --config.train.accumulation_steps=8: 25.7 GiB. Up to 4 devices share all of it.
Command:  python -m llamajax.prepare --input='text/*.jsonl' --tokenizer=hf/llama2_7b \
              --output=data/finetune
          python -m llamajax.train --config=configs/llama2_7b_lora.py \
              --workdir=runs/llama2_7b_lora --config.train.init_from=hf/llama2_7b \
              --config.data.path=data/finetune
Start:    a Hugging Face directory of Llama-2 7B, or any checkpoint of that architecture. It must
          stay where it is: checkpoints of this run hold the adapters alone.
Batch:    16 sequences of 2048: 32,768 tokens a step, 4 sequences at a time.
Result:   the merged model by `llamajax.convert --from=runs/llama2_7b_lora`, the adapters for
          Hugging Face's PEFT in runs/llama2_7b_lora/peft.
Speed:    planned for h100:1, not run: 18,239 tokens/s.
Loss:     unmeasured; depends on the text.

Adapters on every matrix, learning rate 2e-4 and constant scale alpha / rank = 1 after the recipe of
QLoRA (arXiv:2305.14314, appendix B), whose 4-bit weights are bfloat16 here.
"""

from ml_collections import ConfigDict

from llamajax.configs.llama2_7b import get_config as llama2_7b


def get_config() -> ConfigDict:
    """The run."""
    config = llama2_7b()
    config.mesh.fsdp = -1

    config.data.path = "data/finetune"
    config.data.seq_len = 2048
    config.data.global_batch_size = 16

    config.train.init_from = "hf/llama2_7b"
    config.train.eval_every = 100

    config.lora.rank = 16
    config.lora.alpha = 16.0
    config.lora.dropout = 0.05
    config.lora.base_dtype = "bfloat16"

    config.optim.learning_rate = 2e-4
    config.checkpoint.keep = 2
    return config
