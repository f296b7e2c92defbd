"""Prepared text and whole runs inside this process, on its 8 virtual devices."""

import json
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax import sharding
from llamajax.config import RunConfig, load
from llamajax.config.schema import MeshConfig
from llamajax.formats.weights import open_weights
from llamajax.models.abstract import abstract_model
from llamajax.prepare import main as prepare
from llamajax.training.run import train
from llamajax.training.safety.shutdown import Shutdown

CONFIG = Path(__file__).with_name("tiny_run.py")
# Every step saves and evaluates little, so that a few of them show everything.
SHORT = {
    "mesh.fsdp": 4,
    "mesh.tensor": 2,
    "model.num_layers": 1,
    "train.eval_every": 0,
    "train.eval_batches": 1,
    "checkpoint.every_steps": 2,
    "monitoring.progress": "none",
}
TEXT = [f"{'abcdefgh' * (i % 7)} line {i} of a small corpus." for i in range(400)]


class StopAfter(Shutdown):
    """Asks to stop after so many steps, as SIGTERM does; None: never."""

    def __init__(self, steps: int | None):
        super().__init__()
        self._steps_left = steps

    @property
    def requested(self) -> bool:
        return self._steps_left is not None and self._steps_left <= 0

    def begin_updates(self) -> None:  # the loop calls it after every update
        if self._steps_left is not None:
            self._steps_left -= 1


@pytest.fixture(scope="session")
def prepare_texts():
    """Prepares texts as `folder/data` with one worker; they stay in `folder/corpus.jsonl`."""

    def run(folder: Path, texts: Iterable[str], *flags: str, tokenizer: str = "byte") -> Path:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "corpus.jsonl").write_text(lines)
        arguments = [f"--input={folder / 'corpus.jsonl'}", f"--output={folder / 'data'}"]
        defaults = [f"--tokenizer={tokenizer}", "--workers=1"]
        if not any(flag.startswith("--validation_fraction") for flag in flags):
            defaults.append("--validation_fraction=0.05")
        prepare([*arguments, *defaults, *flags])
        return folder / "data"

    return run


@pytest.fixture(scope="session")
def short_data(tmp_path_factory, prepare_texts) -> Path:
    """Bytes of a small corpus."""
    return prepare_texts(tmp_path_factory.mktemp("short"), TEXT)


@pytest.fixture(scope="session")
def short_config(short_data):
    """The config of a short run; keys are written `train__steps=3`."""

    def make(**overrides) -> RunConfig:
        named = {key.replace("__", "."): value for key, value in overrides.items()}
        return load(f"{CONFIG}:{short_data}", SHORT | named)

    return make


@pytest.fixture(scope="session")
def short_run(short_config):
    """Runs `train` for a few steps; after `stop_after` of them it is told to save and leave."""

    def run(workdir: Path, *, stop_after: int | None = None, **overrides) -> int:
        return train(short_config(**overrides), workdir=workdir, shutdown=StopAfter(stop_after))

    return run


@pytest.fixture(scope="session")
def logged():
    """What the run of a workdir logged, without the times."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "tokens_seen", "eval_loss")

    def rows(workdir: Path) -> list[dict]:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return [{k: row[k] for k in kept if k in row} for row in map(json.loads, lines)]

    return rows


@pytest.fixture(scope="session")
def loaded():
    """The weights of a checkpoint or an export by name, in float32 and on 8 devices."""

    def arrays(path: Path) -> dict[str, np.ndarray]:
        weights = open_weights(path)
        mesh = sharding.build_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices())
        model = weights.load(abstract_model(weights.model, mesh, dtype=jnp.dtype("float32")))
        leaves = jax.tree_util.tree_leaves_with_path(model)
        return {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}

    return arrays
