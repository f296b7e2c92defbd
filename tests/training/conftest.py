"""Prepared text and whole runs inside this process, on its 8 virtual devices."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from shell import SHORT, TINY_RUN
from tiny_model import named_arrays
from workdirs import prepare_texts

from llamajax.config import RunConfig, load
from llamajax.formats.weights import open_weights
from llamajax.models.abstract import abstract_model
from llamajax.training.run import train
from llamajax.training.safety.shutdown import Shutdown

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
def short_data(tmp_path_factory) -> Path:
    """Bytes of a small corpus."""
    return prepare_texts(tmp_path_factory.mktemp("short"), TEXT)


@pytest.fixture(scope="session")
def short_config(short_data):
    """The config of a short run; keys are written `train__steps=3`."""

    def make(**overrides) -> RunConfig:
        named = {key.replace("__", "."): value for key, value in overrides.items()}
        return load(f"{TINY_RUN}:{short_data}", SHORT | {"mesh.fsdp": 4, "mesh.tensor": 2} | named)

    return make


@pytest.fixture(scope="session")
def short_run(short_config):
    """Runs `train` for a few steps; after `stop_after` of them it is told to save and leave."""

    def run(workdir: Path, *, stop_after: int | None = None, **overrides) -> int:
        return train(short_config(**overrides), workdir=workdir, shutdown=StopAfter(stop_after))

    return run


@pytest.fixture(scope="session")
def loaded():
    """The weights of a checkpoint or an export by name, in float32 and on 8 devices."""

    def arrays(path: Path) -> dict[str, np.ndarray]:
        weights = open_weights(path)
        wanted = abstract_model(
            weights.model, mesh_of(fsdp=4, tensor=2), dtype=jnp.dtype("float32")
        )
        return named_arrays(weights.load(wanted))

    return arrays
