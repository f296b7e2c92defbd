"""A run at a constant rate that can be annealed at any step: the run, and a branch that is.

Hardware: two CPU cores and 2 GB of memory; any accelerator does.
Command:  after ./launch/quickstart.sh, which prepares the book,
          python -m llamajax.train --config=configs/wsd_branch.py --workdir=runs/wsd
          python -m llamajax.train --config=configs/wsd_branch.py:branch --workdir=runs/annealed
          python -m llamajax.report --workdir=runs/annealed,runs/wsd
          At full size: --config=configs/llama3_8b.py --config.optim.schedule=wsd \
              --config.optim.decay_steps=2000, and for a branch that ends at step 12,000 also
              --config.train.fork=runs/llama3_8b@10000 --config.train.steps=12000
Model:    5.0 M parameters, sequences of 256 tokens, batches of 1,024 tokens, float32.
Branch:   goes on from step 120, its rate falls to a tenth until step 200; up to there the run's own
          rate is constant, and both read the same samples (`report` wants 64 common rows).
Speed:    unmeasured.
Loss:     unmeasured.
"""

from ml_collections import ConfigDict

from llamajax.configs.quickstart import get_config as quickstart


def get_config(part: str = "run") -> ConfigDict:
    """The `run`, or its `branch`."""
    config = quickstart()
    config.data.global_batch_size = 4
    config.train.steps = 250
    config.optim.schedule = "wsd"
    config.optim.decay_steps = config.train.get_ref("steps") // 5
    if part == "branch":
        config.train.fork = "runs/wsd@120"
        config.train.steps = 200
        config.optim.decay_steps = config.train.get_ref("steps") * 2 // 5
    config.optim.warmup_steps = 10
    config.train.log_every = 1  # the paired difference wants many rows
    config.train.eval_every = 40
    config.checkpoint.every_steps = 40
    config.checkpoint.keep_every = 40  # each can be forked
    return config
