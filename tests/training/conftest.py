"""Prepared text and whole runs inside this process, on its 8 virtual devices."""

import json
from pathlib import Path

import pytest

from llamajax.config import RunConfig, load
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
def short_data(tmp_path_factory) -> Path:
    """Bytes of a small corpus."""
    folder = tmp_path_factory.mktemp("short")
    lines = "".join(json.dumps({"text": line}) + "\n" for line in TEXT)
    (folder / "corpus.jsonl").write_text(lines)
    arguments = [f"--input={folder / 'corpus.jsonl'}", "--tokenizer=byte", "--workers=1"]
    prepare([*arguments, f"--output={folder / 'data'}", "--validation_fraction=0.05"])
    return folder / "data"


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
