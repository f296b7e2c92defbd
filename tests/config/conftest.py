"""A valid config, as an object and as a file, for each test to spoil."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from llamajax.config import new_config, preset

VALID = """
from llamajax.config import new_config, preset

def get_config(name="tiny"):
    config = new_config()
    config.model = preset(name)
    config.data.path = "somewhere"
    config.data.seq_len = 64
    config.data.global_batch_size = 8
    config.data.seed = 0
    config.train.steps = 100
    config.train.seed = 0
    config.train.dtype = "float32"
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = config.train.get_ref("steps") // 10
    config.optim.schedule = "cosine"
    config.optim.final_learning_rate = 0.0
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.95
    config.optim.epsilon = 1e-8
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0
    {extra}
    return config
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[..., str]:
    """Writes a config file: the valid one with extra lines, or any source; returns its path."""

    def write(extra: str = "", *, source: str | None = None, name: str = "run.py") -> str:
        path = tmp_path / name
        text = VALID.replace("{extra}", extra.replace("\n", "\n    "))
        path.write_text(text if source is None else source, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def valid() -> ConfigDict:
    """A valid config to change and freeze."""
    namespace: dict = {"new_config": new_config, "preset": preset}
    exec(VALID.replace("{extra}", ""), namespace)
    return namespace["get_config"]()
