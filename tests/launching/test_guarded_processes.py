"""Two processes that meet NaN go back as one does, also when one of them is killed just then.

The weights of one rare byte are NaN: each batch with that byte in it has a loss of NaN.
"""

import json
import signal
import sys

import numpy as np
import pytest
from real_runs import finish, interrupt, launch, prepare, train
from safetensors.numpy import load_file, save_file

from llamajax.monitoring.row_comparison import largest_difference, logged_values
from llamajax.proving.trial import last_step

RARE = "Z"
KEYS = {
    "train__eval_every": 0,
    "checkpoint__every_steps": 1,
    "checkpoint__keep": 99,
    "guard__max_in_a_row": 1,
    "guard__max_rollbacks": 99,
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bytes of text in which few samples have the rare one."""
    texts = [f"line {i} {'of a small corpus ' * (i % 5)}{RARE * (i % 43 == 7)}" for i in range(400)]
    return prepare(tmp_path_factory.mktemp("rare"), texts, validation_fraction=0)


@pytest.fixture(scope="module")
def poisoned(data):
    """A run that began with such weights."""
    folder = data.parent
    finish(train(data, folder / "first", 2, **KEYS))  # its program serves the next run, too
    convert = [f"--from={folder / 'first'}", f"--to={folder / 'hf'}", "--dtype=float32"]
    finish([sys.executable, "-m", "llamajax.convert", *convert])
    (file,) = (folder / "hf").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][ord(RARE)] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})
    code = (  # such weights of others are refused
        "from llamajax import train\n"
        "from llamajax.formats.huggingface import hf_read\n"
        "hf_read.check_finite = lambda *_: None\n"
        "train.run_verb(train.main)\n"
    )
    command = train(data, folder / "poisoned", 2, train__init_from=folder / "hf", **KEYS)
    finish([sys.executable, "-c", code, *command[3:]])  # without python -m llamajax.train
    return folder / "poisoned"


def rollbacks(workdir) -> list[dict]:
    lines = (workdir / "audit.jsonl").read_text().split("\n")
    return [{**json.loads(line), "time": None} for line in lines if line]


def test_a_rollback_of_two_is_that_of_one_and_outlives_a_kill(data, poisoned, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    keys = KEYS | {"train__init_from": poisoned}
    finish(train(data, one, 2, **keys))
    assert last_step(one) == 10
    assert len(rollbacks(one)) >= 2
    # as soon as the first rollback is noted
    command, audit = launch(train(data, two, 1, **keys)), two / "audit.jsonl"
    code, text = interrupt(command, signal.SIGKILL, rank=1, when=audit.exists)
    assert code == 0, text
    assert "worker 1 was killed by SIGKILL" in text
    assert rollbacks(two) == rollbacks(one)
    difference = largest_difference(logged_values(one), logged_values(two))
    assert difference is None or difference.relative < 1e-6
