"""What commit be4ee9a wrote is read with the same bits (`old_run.py`)."""

import hashlib
import json
import shutil
import sys
import tarfile
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from old_run import SETTINGS, unpack_data
from shell import TINY_RUN
from workdirs import read_rows

from llamajax import convert, sharding
from llamajax.checkpoint import named_leaves, open_checkpoint, restore_state
from llamajax.config import load
from llamajax.formats.weights import open_weights
from llamajax.models.abstract import abstract_model
from llamajax.optim import build
from llamajax.training.run import train
from llamajax.training.safety.shutdown import Shutdown
from llamajax.training.state import StateSpec

OTHER_MESH = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).with_name("old_run.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    unpack_data(folder / "data")
    return folder


def hashes(state) -> dict[str, str]:
    found = named_leaves(state).items()
    return {name: hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for name, x in found}


@pytest.mark.parametrize("axes", [{}, OTHER_MESH], ids=["same mesh", "another mesh"])
def test_a_checkpoint_has_the_same_bits(stored, axes):
    config = load(f"{TINY_RUN}:{stored / 'data'}", SETTINGS | axes)
    mesh = sharding.build_mesh(config.mesh, jax.devices())
    wanted = StateSpec(model=config.model, optimizer=build(config.optim, steps=6), mesh=mesh)
    checkpoint = open_checkpoint(stored / "run" / "checkpoints" / "3")
    state = restore_state(checkpoint, wanted.abstract(), partial=True)
    expected = json.loads((stored / "arrays.json").read_text())
    found = hashes(state)
    assert found == {name: expected["3"][name] for name in found}
    assert set(expected["3"]) - set(found) <= {n for n in expected["3"] if n.startswith("guard/")}


class Reads(Shutdown):
    """Counts how often each file under a directory is opened by Python, until the first update."""

    def __init__(self, directory: Path):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._directory: Path | None = directory
        sys.addaudithook(self._hook)  # there is no way to remove it

    def _hook(self, event: str, args: tuple) -> None:
        if event == "open" and self._directory and isinstance(args[0], str | Path):
            path = Path(args[0])
            if path.is_relative_to(self._directory):
                self.counts[path.relative_to(self._directory).as_posix()] += 1

    def begin_updates(self) -> None:
        self._directory = None


def test_a_run_continues_on_another_mesh_and_verifies_once(stored, tmp_path):
    config = load(f"{TINY_RUN}:{stored / 'data'}", SETTINGS | OTHER_MESH)
    run = Path(shutil.copytree(stored / "run", tmp_path / "run"))
    reads = Reads(run / "checkpoints" / "3")
    assert train(config, workdir=run, shutdown=reads) == 0
    listed = json.loads((run / "checkpoints" / "3" / "manifest.json").read_text())["files"]
    assert reads.counts == {"manifest.json": 1, **dict.fromkeys(listed, 1)}
    rows = (read_rows(path / "metrics.jsonl") for path in (stored / "run", run))
    old, new = ([row for row in each if "loss" in row] for each in rows)
    assert [row["step"] for row in new] == [row["step"] for row in old] == list(range(1, 7))
    for name in ("loss", "grad_norm", "learning_rate", "tokens_seen"):
        np.testing.assert_allclose([r[name] for r in new], [r[name] for r in old], rtol=1e-5)


@pytest.mark.parametrize("kind", ["hf", "ours"])
def test_its_exports_have_the_same_bits(stored, tmp_path, kind):
    mesh = sharding.build_mesh(load(f"{TINY_RUN}:x", SETTINGS).mesh, jax.devices())
    weights = open_weights(stored / kind)
    expected = json.loads((stored / "arrays.json").read_text())["6"]
    found = hashes({"model": weights.load(abstract_model(weights.model, mesh))})
    assert found == {name: expected[name] for name in found}
    assert len(found) == 12
    back = tmp_path / "back"
    assert convert.main([f"--from={stored / kind}", f"--to={back}", "--dtype=float32"]) == 0
    stated = b',\n  "model_max_length": 128\n}'  # since 2026-11-30
    for file in (stored / "hf").iterdir():
        assert file.read_bytes() == (back / file.name).read_bytes().replace(stated, b"\n}"), (
            file.name
        )
