"""Prints how fast text is generated here: decoding speed and time to first token, as one table.

    python benchmarks/decode.py --preset=smollm2-135m --batch=1 --prompt_len=128 --new_tokens=64
    python benchmarks/decode.py --preset=tiny --batch=8 --backend=cpu --num_cpu_devices=8 \
        --mesh=fsdp=4,tensor=2

The engine is that of `llamajax.generate`, greedy, without stop tokens; weights and prompts are
random. Compiling is done before anything is timed. The memory bound is the time to read every
weight once for each token of a batch, at the speed that a copy reaches on this machine in this run.
"""

import argparse
import datetime
import resource
import statistics
import time
from pathlib import Path
from typing import Any, get_args

from llamajax.config import freeze, mesh_config, new_config, preset
from llamajax.config.flags import backend_config
from llamajax.config.schema import ComputeDtype, ModelConfig
from llamajax.errors import UserError, run_verb


def random_model(config: ModelConfig, mesh: Any, dtype: Any, *, seed: int) -> Any:
    """A model of random weights, born sharded, in the dtypes that a checkpoint is loaded in."""
    import jax

    from llamajax.models.abstract import abstract_model
    from llamajax.models.llama import Llama

    wanted = abstract_model(config, mesh, dtype=dtype)

    def init(key: jax.Array) -> Llama:
        return jax.tree.map(lambda x, like: x.astype(like.dtype), Llama(config, key), wanted)

    placed = jax.tree.map(lambda x: x.sharding, wanted)
    return jax.jit(init, out_shardings=placed)(jax.random.key(seed))
