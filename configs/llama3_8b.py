"""Llama-3 8B from scratch on one node of 8 devices.

Hardware: 8 accelerators of 80 GB; everything sharded over them. Planned (`llamajax plan`, jax 0.12,
          2026-11-30) for h100:8: 51.9 of 72.8 GiB a device, 29.9 with --config.train.remat=full.
Command:  python -m llamajax.prepare --input='text/*.jsonl' --tokenizer=tokenizer.model \
              --output=data/llama3
          python -m llamajax.train --config=configs/llama3_8b.py --workdir=runs/llama3_8b \
              --config.data.path=data/llama3
Batch:    128 sequences of 8192: 1,048,576 tokens a step, 21 G tokens in all.
Speed:    planned for h100:8, not run: 10,496 tokens/s a device, 8,262 with `full`.
          Published elsewhere: 6,667 tokens/s a device with torchtitan on 8 H100.
Loss:     unmeasured.
"""

from ml_collections import ConfigDict

from llamajax.config import new_config, preset


def get_config() -> ConfigDict:
    """The run."""
    config = new_config()
    config.model = preset("llama3-8b")
    config.mesh.fsdp = 8

    config.data.path = "data/llama3"
    config.data.seq_len = 8192
    config.data.global_batch_size = 128
    config.data.seed = 0

    config.train.steps = 20_000
    config.train.seed = 0
    config.train.dtype = "bfloat16"
    config.train.accumulation_steps = 16
    config.train.remat = "dots"
    config.train.eval_every = 500
    config.train.eval_batches = 16

    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = config.train.get_ref("steps") // 20
    config.optim.schedule = "cosine"
    config.optim.final_learning_rate = 3e-5
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.95
    config.optim.epsilon = 1e-8
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0

    config.checkpoint.every_steps = 500
    config.checkpoint.keep_every = 5000
    return config
