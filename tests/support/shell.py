"""Verbs as a user starts them."""

import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import warm

TINY_RUN = Path(__file__).parents[1] / "training" / "tiny_run.py"
# Every second step saves, and nothing more than that is done: a few steps show everything.
SHORT = {
    "model.num_layers": 1,
    "train.eval_every": 0,
    "train.eval_batches": 1,
    "train.loss_chunk_tokens": 512,
    "checkpoint.every_steps": 2,
    "monitoring.progress": "none",
}


def verb(name: str, *flags: str) -> list[str]:
    """The command of a verb."""
    return [sys.executable, "-m", f"llamajax.{name}", *flags]


def train_command(data: Path | str, workdir: Path, keys: Mapping[str, object]) -> list[str]:
    """The command of a run of `tiny_run.py` with these keys of its config."""
    overrides = (f"--config.{key}={value}" for key, value in keys.items())
    return verb("train", f"--config={TINY_RUN}:{data}", f"--workdir={workdir}", *overrides)


def shell(name: str, *flags: str, **options) -> subprocess.CompletedProcess:
    """Run a verb to its end; both outputs as text."""
    return warm.run(verb(name, *flags), capture_output=True, text=True, timeout=900, **options)


def started(command: list[str], **options) -> subprocess.Popen:
    """Start a command with both outputs as one text."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return warm.Popen(command, **streams, **options)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
