"""Two saved checkpoints, made once."""

import shutil
from pathlib import Path

import pytest
from tiny_state import META, checkpointer, make_state


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 10 and 20, of seeds 1 and 2."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with checkpointer(directory) as saver:
        saver.save(10, make_state((4, 2), seed=1), meta=META)
        saver.save(20, make_state((4, 2), seed=2), meta=META | {"later": True})
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The same, free to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))
