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

from llamajax.config import new_config, preset


def get_config(what: str = "full") -> ConfigDict:
    """The run that trains `full`, all weights, or `lora`, adapters beside them."""
    config = new_config()
    config.model = preset("quickstart")
    config.mesh.fsdp = -1

    config.data.path = "data/mine"
    config.data.seq_len = 256
    config.data.global_batch_size = 8
    config.data.seed = 0

    config.train.init_from = "runs/quickstart"
    config.train.steps = 200
    config.train.seed = 0
    config.train.dtype = "float32"
    config.train.remat = "none"
    config.train.log_every = 10
    config.train.eval_every = 50

    if what == "lora":
        config.lora.rank = 8
        config.lora.alpha = 16.0
    # Ten times as much for adapters: B starts at zero, and the rank is low.
    config.optim.learning_rate = 2e-3 if what == "lora" else 3e-4
    config.optim.warmup_steps = config.train.get_ref("steps") // 20
    config.optim.schedule = "cosine"
    config.optim.final_learning_rate = 0.0
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.95
    config.optim.epsilon = 1e-8
    config.optim.weight_decay = 0.0
    config.optim.clip_norm = 1.0

    config.checkpoint.every_steps = 50
    config.checkpoint.keep = 2
    return config
