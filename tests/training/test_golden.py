"""A tiny run whose losses are known: what no test of a part has noticed changes them.

Everything between a seed and a loss is in it: initial weights, the model, the loss, clipping, Adam,
decay, the schedule. The file is written again by `python tests/training/test_golden.py`.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from meshes import mesh_of
from plain_batch import plain_batch
from tiny_model import COMPUTE, tiny_model, tiny_optim

from llamajax import optim, sharding
from llamajax.config.model_schema import ModelConfig, RopeScaling
from llamajax.config.schema import OptimConfig, TrainConfig
from llamajax.training.state import StateSpec
from llamajax.training.step import train_step

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 20
# Float32 on another processor or release of JAX may round otherwise. Measured, with these settings:
# an Adam epsilon of 1e-8 moves a loss by 2e-3, beta2 = 0.95 by 3e-3, an RMSNorm epsilon of 1e-5 by
# 1e-3, rotary angles without scaling by 1e-4.
TOLERANCE = 2e-5  # relative
SCALING = RopeScaling(
    factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16
)
SIZES = {"vocab_size": 101, "hidden_size": 24, "intermediate_size": 40, "head_size": 10}
MODEL = tiny_model(**SIZES, rope_theta=12_345.0, rope_scaling=SCALING, norm_eps=3e-5, init_std=0.02)
RATES = {"learning_rate": 1e-2, "warmup_steps": 4, "final_learning_rate": 1e-3}
DECAYS = {"beta1": 0.85, "beta2": 0.93, "weight_decay": 0.2}
OPTIM = tiny_optim(**RATES, **DECAYS, schedule="cosine", epsilon=1e-5, clip_norm=0.7)


def curve(model: ModelConfig = MODEL, optimizer_config: OptimConfig = OPTIM) -> dict[str, list]:
    """Loss and norm of the gradient of each step, on one device."""
    mesh, compute = mesh_of(), dataclasses.replace(COMPUTE, loss_chunk_tokens=50)
    optimizer = optim.build(optimizer_config, steps=STEPS)
    train = TrainConfig(steps=STEPS, seed=7, dtype="float32")
    state = StateSpec(model=model, optimizer=optimizer, mesh=mesh).init(train.seed)
    step = train_step(optimizer, optimizer_config, train, compute, mesh)
    # RandomState's numbers are frozen for ever, unlike default_rng's. Few batches, seen again: the
    # losses fall, so that the later ones depend on all updates.
    tokens = np.random.RandomState(0).randint(0, model.vocab_size, (2, 4, 25))
    rows: dict[str, list] = {"loss": [], "grad_norm": []}
    for n in range(STEPS):
        state, metrics = step(state, sharding.put_batch(plain_batch(tokens[n % 2]), mesh))
        for name, values in rows.items():
            values.append(metrics[name].item())
    return rows


def test_the_losses_are_those_of_the_file():
    golden, found = json.loads(GOLDEN.read_text()), curve()
    for name, expected in golden.items():
        error = np.abs(np.array(found[name]) / expected - 1)
        assert error.max() <= TOLERANCE, (
            f"{name} of step {int(np.argmax(error > TOLERANCE)) + 1} differs from {GOLDEN.name} by "
            f"{error.max():.1e} (relative), more than float32 explains: this change trains other "
            "models than before. If that is meant (another initialization, a corrected formula), "
            "say why in LOG.md and write the file anew: python tests/training/test_golden.py. "
            "If it was to change speed, memory or layout only, the change is wrong; never raise "
            "the tolerance."
        )


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(curve(), indent=1) + "\n")
