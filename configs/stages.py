"""A run in three stages on the bundled book: short samples, larger batches, longer samples.

Hardware: two CPU cores and 2 GB of memory; any accelerator does.
Command:  after ./launch/quickstart.sh, which prepares the book,
          python -m llamajax.train --config=configs/stages.py --workdir=runs/stages
          At full size, Llama3-8B that reads 32,768 tokens in its last tenth:
          python -m llamajax.train --config=llama3_8b --workdir=runs/8b --config.train.remat=full \\
              --config.model.max_seq_len=32768 --config.data.stages='[{"from_step": 18000,
              "seq_len": 32768, "global_batch_size": 32, "accumulation_steps": 4, "rope_scaling":
              {"type": "yarn", "factor": 4, "original_max_seq_len": 8192}}]'
Model:    5.0 M parameters, float32; samples of 128 tokens, 8 and then 16 in a batch, at last 4 of
          512 tokens with rotary frequencies scaled for them (yarn). 410 k tokens in 240 steps.
Speed:    unmeasured: under other load.
Loss:     measured 2026-11-30 on 2 shared CPU cores (jax 0.12): 5.472 nats per held-out token after
          240 steps, in samples of 512 tokens (perplexity 238); 5.610 at the last border, step 160,
          of 128.
"""

from ml_collections import ConfigDict

from llamajax.configs.quickstart import get_config as quickstart


def get_config() -> ConfigDict:
    """The run."""
    config = quickstart()
    config.train.steps = 240
    config.train.eval_every = 40
    config.checkpoint.every_steps = 40

    config.data.seq_len = 128
    config.data.global_batch_size = 8
    steps = config.train.get_ref("steps")
    config.data.stages = [
        {"from_step": steps // 3, "global_batch_size": 16},
        {
            "from_step": 2 * steps // 3,
            "seq_len": 512,
            "global_batch_size": 4,
            "rope_scaling": {"type": "yarn", "factor": 4, "original_max_seq_len": 128},
        },
    ]
    return config
