"""A small model finetuned on other text, on any machine: all its weights, or adapters.

Hardware: two CPU cores and 2 GB of memory; any accelerator does.
Command:  ./launch/quickstart.sh first, which pretrains a model of 5 M parameters on one book
          python -m llamajax.prepare --input='my/*.txt' --tokenizer=runs/quickstart/data \
              --output=data/mine
          python -m llamajax.train --config=configs/finetune_small.py --workdir=runs/finetuned
          Adapters of rank 8 alone: --config=configs/finetune_small.py:lora --workdir=runs/adapted
Start:    the newest checkpoint of runs/quickstart; other weights by --config.train.init_from, of
          which --config.model must be the architecture.
Speed:    unmeasured.
Loss:     unmeasured; depends on the text.
"""

from ml_collections import ConfigDict

from llamajax.configs.quickstart import get_config as quickstart


def get_config(what: str = "full") -> ConfigDict:
    """The run that trains `full`, all weights, or `lora`, adapters beside them."""
    config = quickstart()
    config.data.path = "data/mine"
    config.train.init_from = "runs/quickstart"
    config.train.remat = "none"

    if what == "lora":
        config.lora.rank = 8
        config.lora.alpha = 16.0
    # Ten times as much for adapters: B starts at zero, and the rank is low.
    config.optim.learning_rate = 2e-3 if what == "lora" else 3e-4
    config.optim.warmup_steps = config.train.get_ref("steps") // 20
    config.optim.final_learning_rate = 0.0
    config.optim.weight_decay = 0.0
    return config
