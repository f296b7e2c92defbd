"""A run small enough that every plan of it compiles in seconds; sizes are nobody's default."""

from ml_collections import ConfigDict

from llamajax.config import new_config, preset


def get_config() -> ConfigDict:
    """The run, on fsdp 4 x tensor 2."""
    config = new_config()
    config.model = preset("tiny")
    config.model.vocab_size = 256
    config.mesh.fsdp = 4
    config.mesh.tensor = 2
    config.data.path = "nowhere"
    config.data.seq_len = 64
    config.data.global_batch_size = 16
    config.data.seed = 0
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 2
    config.optim.schedule = "cosine"
    config.optim.final_learning_rate = 0.0
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.95
    config.optim.epsilon = 1e-8
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0
    config.train.steps = 10
    config.train.seed = 0
    config.train.dtype = "float32"
    config.train.remat = "full"
    config.train.attention = "xla"
    config.train.accumulation_steps = 2
    return config
