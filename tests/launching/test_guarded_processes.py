"""Two processes that meet NaN go back as one does, also when one of them is killed just then.

The weights of one rare byte are NaN: each batch with that byte in it has a loss of NaN.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import warm
from real_runs import launch, train
from safetensors.numpy import load_file, save_file

from llamajax.monitoring.row_comparison import largest_difference, logged_values
from llamajax.proving.trial import last_step

RARE = "Z"
KEYS = {
    "train.eval_every": 0,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 99,
    "guard.max_in_a_row": 1,
    "guard.max_rollbacks": 99,
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bytes of text in which few samples have the rare one."""
    folder = tmp_path_factory.mktemp("rare")
    lines = [f"line {i} {'of a small corpus ' * (i % 5)}{RARE * (i % 43 == 7)}" for i in range(400)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    arguments = [f"--input={folder / 'a.jsonl'}", "--tokenizer=byte", "--workers=1"]
    arguments += [f"--output={folder / 'data'}", "--validation_fraction=0"]
    warm.run([sys.executable, "-m", "llamajax.prepare", *arguments], check=True)
    return folder / "data"


@pytest.fixture(scope="module")
def environment():
    return dict(os.environ)


@pytest.fixture(scope="module")
def flags(data, environment):
    """Overrides of a guarded run that begins with such weights."""
    folder = data.parent
    given = [f"--config.{key}={value}" for key, value in KEYS.items()]
    first = [*train(data, folder / "first", 2), *given]  # its program serves the next run, too
    warm.run(first, env=environment, check=True, capture_output=True)
    convert = [f"--from={folder / 'first'}", f"--to={folder / 'hf'}", "--dtype=float32"]
    warm.run([sys.executable, "-m", "llamajax.convert", *convert], check=True)
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
    poisoned = train(data, folder / "poisoned", 2)[3:]  # without python -m llamajax.train
    origin = f"--config.train.init_from={folder / 'hf'}"
    command = [sys.executable, "-c", code, *poisoned, *given, origin]
    warm.run(command, env=environment, check=True, capture_output=True)
    return [*given, f"--config.train.init_from={folder / 'poisoned'}"]


def killed_while_it_rolls_back(command, environment, workdir) -> str:
    """What a launch says whose worker 1 is killed as soon as the first rollback is noted."""
    audit, poll = workdir / "audit.jsonl", threading.Event()
    with warm.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        first = process.stderr.readline()
        pids = [int(pid) for pid in re.search(r"pids ([\d, ]+)", first).group(1).split(",")]
        while not audit.exists() and process.poll() is None:
            poll.wait(0.001)
        os.kill(pids[1], signal.SIGKILL)
        text = process.stderr.read()
    assert process.returncode == 0, text
    return text


def rollbacks(workdir) -> list[dict]:
    lines = (workdir / "audit.jsonl").read_text().split("\n")
    return [{**json.loads(line), "time": None} for line in lines if line]


def test_a_rollback_of_two_is_that_of_one_and_outlives_a_kill(data, environment, flags, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    alone = warm.run([*train(data, one, 2), *flags], env=environment, capture_output=True)
    assert alone.returncode == 0, alone.stderr
    assert last_step(one) == 10
    assert len(rollbacks(one)) >= 2
    text = killed_while_it_rolls_back([*launch(data, two), *flags], environment, two)
    assert "worker 1 was killed by SIGKILL" in text
    assert rollbacks(two) == rollbacks(one)
    difference = largest_difference(logged_values(one), logged_values(two))
    assert difference is None or difference.relative < 1e-6
