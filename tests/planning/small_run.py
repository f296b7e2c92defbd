"""A run small enough that every plan of it compiles in seconds; sizes are nobody's default."""

from pathlib import Path

from ml_collections import ConfigDict

from llamajax.config.config_file import read_file

TINY_RUN = Path(__file__).parents[1] / "training" / "tiny_run.py"


def get_config() -> ConfigDict:
    """The run, on fsdp 4 x tensor 2."""
    config = read_file(f"{TINY_RUN}:nowhere")
    config.model.vocab_size = 256
    config.mesh.update(fsdp=4, tensor=2)
    config.data.update(seq_len=64, global_batch_size=16)
    config.optim.warmup_steps = 2
    config.train.update(steps=10, remat="full", attention="xla", accumulation_steps=2)
    config.train.loss_chunk_tokens = 512
    return config
