"""The quickstart's model with Muon, on the bundled book.

Hardware: two CPU cores and 2 GB of memory; any accelerator does.
Command:  after ./launch/quickstart.sh, which prepares the book,
          python -m llamajax.train --config=configs/muon_small.py --workdir=runs/muon
          At full size: --config=configs/llama2_7b.py --config.optim.name=muon
Model:    5.0 M parameters, sequences of 256 tokens, batches of 2,048 tokens, float32.
Speed:    unmeasured; Newton-Schulz adds 5 x (4 m^2 n + 2 m^3) operations a step for each matrix.
Loss:     measured 2026-11-30 (jax 0.12): 5.046 nats per held-out token after 200 steps, 5.062 with
          the averaged weights; the quickstart, with AdamW at the same rate, 5.49.
          On the book and six novels, 200 steps of 1,024 tokens, rates tuned for both, three seeds:
          5.376 +- 0.003 nats per held-out token, AdamW 5.870 +- 0.021
          (benchmarks/results/2026-11-30-muon.md).
"""

from ml_collections import ConfigDict

from llamajax.configs.quickstart import get_config as quickstart


def get_config() -> ConfigDict:
    """The run."""
    config = quickstart()
    config.optim.name = "muon"
    config.optim.ema_decay = 0.98
    return config
