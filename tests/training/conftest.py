"""Prepared text and whole runs inside this process, on its 8 virtual devices."""

import dataclasses
import json
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
from llamajax.training import programs
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


# Keys of a config that change what the host does, and no program.
HOST = {"init_from", "base_model", "fork", "resume_step", "restart", "log_every", "tasks"}
HOST |= {"eval_every", "eval_batches", "sample_prompts", "sample_tokens", "sample_temperature"}
HOST |= {"max_in_a_row", "then", "max_rollbacks", "hang_timeout_s", "blackbox_steps"}


@pytest.fixture(scope="session", autouse=True)
def compiled_once():
    """Each program is traced and compiled once for all runs of this process.

    Returns the list of what runs ask for: batch and length of each stage.
    """
    compiled, compile_programs, asked = {}, programs.compile_programs, []

    def compiled_programs(stage, state):
        c = stage.config
        sizes = c.data.global_batch_size, c.data.seq_len
        key = [sizes, c.data.mask_documents, stage.evaluated.tasks is None]
        for section in (c.model, c.optim, c.train, c.lora, c.guard, c.mesh, c.backend):
            fields = dataclasses.asdict(section).items()
            key.append({name: value for name, value in fields if name not in HOST})
        key = json.dumps(key)
        if key not in compiled:
            compiled[key] = compile_programs(stage, state)
        asked.append(sizes)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "compile_programs", compiled_programs)
        yield asked


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
def base(short_run, tmp_path_factory) -> Path:
    """The --workdir of a finished run, whose weights others begin from; not to be changed."""
    workdir = tmp_path_factory.mktemp("base")
    assert short_run(workdir, train__steps=3) == 0
    return workdir


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
