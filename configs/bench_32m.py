"""The workload that systems are compared with on a CPU: 32.0 M parameters, 4 x 512 tokens a step.

Hardware: two CPU cores and 4 GB of memory.
Command:  python -m llamajax.prepare --input=launch/text/moby_dick.txt --tokenizer=train:8192 \
              --output=runs/bench/data
          python -m llamajax.train --config=configs/bench_32m.py:float32 --workdir=runs/bench
          The argument is the dtype of the matrix products: float32 (the default) or bfloat16.
Speed:    unmeasured. Peers on such a machine: transformers compiled 886 tokens/s in fp32.
Loss:     unmeasured; 100 steps are for the clock, not for the model.
"""

from ml_collections import ConfigDict

from llamajax.config import new_config, preset


def get_config(dtype: str = "float32") -> ConfigDict:
    """The run, with matrix products in `dtype`."""
    config = new_config()
    config.model = preset("bench-32m")

    config.data.path = "runs/bench/data"
    config.data.seq_len = 512
    config.data.global_batch_size = 4
    config.data.seed = 0

    config.train.steps = 100
    config.train.seed = 0
    config.train.dtype = dtype
    config.train.remat = "dots"

    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = config.train.get_ref("steps") // 10
    config.optim.schedule = "constant"
    config.optim.final_learning_rate = 3e-4
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.95
    config.optim.epsilon = 1e-8
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0

    config.checkpoint.every_minutes = None
    return config
