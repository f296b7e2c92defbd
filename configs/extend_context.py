"""A model of context 8,192 trained on to 32,768 with YaRN; or the quickstart's, 256 to 1,024.

Hardware: 8 accelerators of 80 GB; `small`: two CPU cores and 2 GB of memory.
Command:  with the weights of Llama-3 8B in hf/llama3_8b, and long documents prepared,
          python -m llamajax.train --config=configs/extend_context.py --workdir=runs/extended \
              --config.train.init_from=hf/llama3_8b --config.data.path=data/long
          After ./launch/quickstart.sh: --config=configs/extend_context.py:small
          `evaluate`, `generate` and `convert` then read runs/extended with its longer context.
Batch:    64 sequences of 32,768: 2.1 M tokens a step, 0.84 G tokens in all.
Speed:    unmeasured.
Loss:     8b: unmeasured. small: measured 2026-11-30 (jax 0.12, 2 shared CPU cores), in nats per
          held-out token: 5.491 for the quickstart's weights in samples of 256 tokens, 5.517 of
          1,024; with the scaling 5.500 of 1,024 after 10 steps, 5.481 after 20.
"""

from ml_collections import ConfigDict

from llamajax.configs.llama3_8b import get_config as llama3_8b
from llamajax.configs.quickstart import get_config as quickstart


def get_config(size: str = "8b") -> ConfigDict:
    """The run that extends Llama-3 8B (`8b`) or the quickstart's model (`small`) four times."""
    is_small = size == "small"
    config = quickstart() if is_small else llama3_8b()
    original = config.data.seq_len
    config.model.rope_scaling = {"type": "yarn", "factor": 4.0, "original_max_seq_len": original}
    config.model.max_seq_len = config.data.seq_len = 4 * original

    config.data.path = "runs/quickstart/data" if is_small else "data/long"
    config.data.global_batch_size = 2 if is_small else 64
    config.data.seed = 1

    config.train.init_from = "runs/quickstart" if is_small else "hf/llama3_8b"
    config.train.steps = 50 if is_small else 400
    config.train.accumulation_steps = 1 if is_small else 8
    config.train.remat = "full"
    config.train.log_every = 10
    config.train.eval_every = 10 if is_small else 100
    config.train.eval_batches = 16

    config.optim.learning_rate = 2e-4 if is_small else 2e-5
    config.optim.warmup_steps = config.train.get_ref("steps") // 20
    config.optim.final_learning_rate = 0.0
    config.optim.weight_decay = 0.0

    config.checkpoint.every_steps = 100
    config.checkpoint.keep = 3
    config.checkpoint.keep_every = None
    return config
