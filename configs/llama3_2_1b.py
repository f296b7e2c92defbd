"""Llama-3.2 1B (tied embeddings, scaled rotary) on one accelerator, or on all of one node.

Hardware: one accelerator of 80 GB, or of 40 GB with --config.train.remat=full; more devices share
          it by themselves. Planned (`llamajax plan`, jax 0.12, 2026-11-30) for h100:1: 49.0 of
          72.8 GiB, 25.1 with `full`.
Command:  python -m llamajax.prepare --input='text/*.jsonl' --tokenizer=tokenizer.model \
              --output=data/llama3
          python -m llamajax.train --config=configs/llama3_2_1b.py --workdir=runs/llama3_2_1b \
              --config.data.path=data/llama3
Batch:    64 sequences of 4096: 262,144 tokens a step, 2.6 G tokens in all.
Speed:    planned for h100:1, not run: 65,902 tokens/s, 54,191 with `full`.
Loss:     unmeasured.
"""

from ml_collections import ConfigDict

from llamajax.config import new_config, preset


def get_config() -> ConfigDict:
    """The run."""
    config = new_config()
    config.model = preset("llama3.2-1b")
    config.mesh.fsdp = -1

    config.data.path = "data/llama3"
    config.data.seq_len = 4096
    config.data.global_batch_size = 64
    config.data.seed = 0

    config.train.steps = 10_000
    config.train.seed = 0
    config.train.dtype = "bfloat16"
    config.train.accumulation_steps = 8
    config.train.remat = "dots"
    config.train.eval_every = 500
    config.train.eval_batches = 16

    config.optim.learning_rate = 5e-4
    config.optim.warmup_steps = config.train.get_ref("steps") // 20
    config.optim.schedule = "cosine"
    config.optim.final_learning_rate = 5e-5
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.95
    config.optim.epsilon = 1e-8
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0

    config.checkpoint.every_steps = 500
    return config
