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
Branch:   goes on from step 600, its rate falls to a tenth until step 800; up to there the run's own
          rate is constant, and both read the same samples (`report` needs 64 common rows).
Speed:    unmeasured.
Loss:     unmeasured at this size. With 0.6 M parameters (model.num_layers=1, hidden_size=64,
          intermediate_size=176, num_heads=2, num_kv_heads=1, head_size=32; optim.learning_rate
          1e-2, final_learning_rate 1e-3), measured 2026-11-30 (jax 0.12, 2 shared CPU cores), in
          nats per held-out token: 5.540 at step 600; at 800 the branch 5.394, the run 5.475 (at
          1,000, annealed as well, 5.339). Run - branch on the same training samples, steps 701 to
          800: +0.087, 95 % interval -0.011 to +0.185. Annealed from 120 to 200 the branch is
          behind, 6.072 and 6.027: a model that still learns fast gains nothing by it.
"""

from ml_collections import ConfigDict

from llamajax.configs.quickstart import get_config as quickstart


def get_config(part: str = "run") -> ConfigDict:
    """The `run`, or its `branch`."""
    config = quickstart()
    config.data.global_batch_size = 4
    config.train.steps = 1000
    config.optim.schedule = "wsd"
    config.optim.decay_steps = config.train.get_ref("steps") // 5
    if part == "branch":
        config.train.fork = "runs/wsd@600"
        config.train.steps = 800
        config.optim.decay_steps = config.train.get_ref("steps") // 4
    config.optim.warmup_steps = 10
    config.train.log_every = 1  # the paired difference needs many rows
    config.train.eval_every = 200
    config.checkpoint.every_steps = 200
    config.checkpoint.keep_every = 200  # each can be forked
    return config
