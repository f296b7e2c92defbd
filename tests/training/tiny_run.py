"""The config of the runs that the tests start as a user would: small, packed, evaluated, saved."""

from ml_collections import ConfigDict

from llamajax.config import new_config, preset


def get_config(path: str) -> ConfigDict:
    """A run on the prepared directory `path`."""
    config = new_config()
    config.model = preset("tiny")
    config.model.vocab_size = 258  # bytes, BOS and EOS
    config.data.path = path
    config.data.seq_len = 48
    config.data.global_batch_size = 8
    config.data.seed = 1
    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = 3
    config.optim.schedule = "cosine"
    config.optim.final_learning_rate = 0.0
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.95
    config.optim.epsilon = 1e-8
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0
    config.train.steps = 60
    config.train.seed = 0
    config.train.dtype = "float32"
    config.train.remat = "none"
    config.train.eval_every = 15
    config.checkpoint.every_steps = 4
    config.monitoring.sinks = ("jsonl",)
    return config
