"""What the verbs that compute do with the machine: one that is not there, programs that are."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import warm
from shell import shell
from workdirs import save_random

from llamajax.config.presets import PRESETS

# A platform that JAX knows, and that no package here serves.
_SERVED = importlib.util.find_spec("jax_plugins") and any(
    importlib.util.find_spec(f"jax_plugins.{name}") for name in ("xla_cuda12", "xla_cuda13")
)
ABSENT = "rocm" if _SERVED else "cuda"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with one checkpoint of a random model, and some tokens."""
    folder = tmp_path_factory.mktemp("run")
    save_random(folder, dataclasses.replace(PRESETS["tiny"], num_layers=1))
    np.save(folder / "ids.npy", np.arange(16, dtype=np.int32))
    return folder


def commands(workdir) -> dict[str, list[str]]:
    """Each verb with what it needs, in front of flags that choose a backend."""
    given = f"--checkpoint={workdir}"
    return {
        "train": ["train", "--config=configs/quickstart.py", f"--workdir={workdir / 'new'}"],
        "evaluate": ["evaluate", given, f"--token_ids={workdir / 'ids.npy'}"],
        "generate": ["generate", given, "--prompt_ids=1,2", "--max_new_tokens=2"],
    }


def run(arguments: list[str], **env: str) -> subprocess.CompletedProcess:
    return shell(*arguments, env=os.environ | env)


@pytest.mark.parametrize(
    ("verb", "platform", "words"),
    [
        ("train", ABSENT, "did not come up"),
        ("generate", ABSENT, "did not come up"),
        ("train", "nosuch", "no plugin of that name is installed"),
    ],
)
def test_a_platform_that_is_not_there_is_one_message_and_2(workdir, verb, platform, words):
    flag = "--config.backend.name" if verb == "train" else "--backend"
    done = run([*commands(workdir)[verb], f"{flag}={platform}"])
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: backend {platform!r} did not come up")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workdir / "new").exists(), "nothing was begun on another platform"


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("JAX_PLATFORMS=nosuch", "backend 'nosuch' did not come up"),
        (f"JAX_PLATFORMS={ABSENT},cpu", f"backend '{ABSENT}' did not come up"),
        ("JAX_DISABLE_JIT=1", "JAX_DISABLE_JIT is set"),
        ("JAX_ENABLE_X64=maybe", "JAX cannot read JAX_ENABLE_X64=maybe"),
        ("JAX_DEFAULT_MATMUL_PRECISION=2", "JAX cannot read JAX_DEFAULT_MATMUL_PRECISION=2"),
    ],
)
def test_the_environment_is_no_less_wanted(workdir, variable, words):
    name, _, value = variable.partition("=")
    done = run(commands(workdir)["generate"], **{name: value})
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {words}")


def test_what_would_change_numbers_in_the_environment_is_ignored_and_said():
    code = "from llamajax.backends import start; from llamajax.config import BackendConfig;"
    code += "import jax; print(start(BackendConfig(name='cpu')).note, jax.numpy.arange(2.0).dtype)"
    env = os.environ | {"JAX_ENABLE_X64": "1", "JAX_RANDOM_SEED_OFFSET": "1"}
    done = warm.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.startswith("JAX_ENABLE_X64, JAX_RANDOM_SEED_OFFSET of the environment")
    assert done.stdout.endswith("is ignored float32\n")


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_programs_are_kept_for_the_next_time(workdir, tmp_path, verb, monkeypatch):
    arguments = [*commands(workdir)[verb], "--backend=cpu"]
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # that of all tests
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    first = run(arguments, **env)
    kept = sorted((tmp_path / "llamajax" / "programs").glob("*/*.program"))
    assert kept, first.stderr
    for path in kept:
        os.utime(path, (1000, 1000))
    second = run(arguments, **env)
    assert second.stdout == first.stdout
    assert second.returncode == first.returncode == 0, second.stderr
    assert sorted((tmp_path / "llamajax" / "programs").glob("*/*.program")) == kept
    assert all(path.stat().st_mtime > 1000 for path in kept), "each was read"
