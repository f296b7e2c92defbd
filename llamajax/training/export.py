"""Weights leaving a run in formats of others: Hugging Face's while training, PEFT's at the end."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from llamajax import data
from llamajax.checkpoint import newest_checkpoint
from llamajax.checkpoint.directory_owner import checkpoint_directory
from llamajax.checkpoint.location import locate
from llamajax.config import RunConfig
from llamajax.errors import UserError
from llamajax.formats.huggingface.hf_write import export_hf
from llamajax.formats.peft import write_peft
from llamajax.formats.weights import TOKENIZER
from llamajax.models.lora import merge
from llamajax.monitoring import Progress
from llamajax.training.state import TrainState


def _target(workdir: Path, step: int) -> Path:
    return workdir / "hf" / str(step)


def is_exported(workdir: Path, step: int) -> bool:
    """Whether the export of `step` is there; one that was cut off is not."""
    return _target(workdir, step).is_dir()


def exporter(
    config: RunConfig, workdir: Path, progress: Progress
) -> Callable[[int, TrainState], None]:
    """What writes `hf/STEP`: adapters merged, in the dtype of `train.dtype`.

    A failure costs the export and a warning, never the run. To be called by all processes.
    """

    merged = jax.jit(functools.partial(merge, dtype=jnp.dtype(config.train.dtype)))

    def export(step: int, state: TrainState) -> None:
        whole = state.whole
        model = whole if state.adapters is None else merged(whole)
        try:
            tokenizer = data.load_tokenizer(workdir / TOKENIZER)
            lines = export_hf(
                model,
                config.model,
                _target(workdir, step),
                dtype=config.train.dtype,
                tokenizer=tokenizer,
                overwrite=True,
            )
        except UserError as error:
            lines = [f"step {step} was not exported: {error}"]
        for line in lines:
            progress.note(f"warning: {line}")

    return export


def write_adapters(config: RunConfig, base: dict[str, str], workdir: Path) -> None:
    """Write the newest adapters as `peft/`. To be called by all processes."""
    checkpoints = checkpoint_directory(workdir, config.checkpoint.directory)
    newest = newest_checkpoint(checkpoints)
    write_peft(newest, workdir / "peft", lora=config.lora, base=locate(base["path"]))
