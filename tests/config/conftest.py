"""A valid config, as an object and as a file, for each test to change."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from llamajax.config.config_file import read_file

VALID = """
from llamajax.config import new_config, preset

def get_config(name="tiny"):
    config = new_config()
    config.model = preset(name)
    config.data.update(path="somewhere", seq_len=64, global_batch_size=8, seed=0)
    config.train.update(steps=100, seed=0, dtype="float32")
    config.optim.warmup_steps = config.train.get_ref("steps") // 10
    config.optim.update(learning_rate=1e-3, schedule="cosine", final_learning_rate=0.0)
    config.optim.update(beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0)
    {extra}
    return config
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[..., str]:
    """Write a config file, the valid one with extra lines or any source; return its path."""

    def write(extra: str = "", *, source: str | None = None, name: str = "run.py") -> str:
        path = tmp_path / name
        text = VALID.replace("{extra}", extra.replace("\n", "\n    "))
        path.write_text(text if source is None else source, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def valid(config_file) -> ConfigDict:
    """A valid config to change and freeze."""
    return read_file(config_file())
