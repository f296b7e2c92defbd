"""Export the weights of a run: Hugging Face's format while training, PEFT's at the end."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from llamajax.checkpoint import newest_checkpoint
from llamajax.checkpoint.location import store_errors_explained
from llamajax.config import RunConfig
from llamajax.config.values import show
from llamajax.errors import UserError
from llamajax.formats.foreign_weights import Export
from llamajax.formats.huggingface.hf_write import write_hf
from llamajax.formats.huggingface.model_card import RunOrigin, hub_name, model_card
from llamajax.formats.llama_sources import ModelSource
from llamajax.formats.peft import write_peft
from llamajax.formats.weights import TOKENIZER, Weights
from llamajax.models.lora import merge
from llamajax.tokenizers.tokenizer_identity import load_recorded
from llamajax.training.state import TrainState
from llamajax.training.workdir import Run

_merge = jax.jit(merge, static_argnames="dtype")


def exports_after(config: RunConfig, step: int) -> bool:
    """Return whether the weights are exported after update `step`."""
    every, last = config.checkpoint.export_hf_every, config.train.steps
    return bool(every) and (step == last or step % every == 0)


def is_exported(workdir: Path, step: int) -> bool:
    """Return whether the export of `step` is there; one that was cut off is not."""
    return (workdir / "hf" / str(step)).is_dir()


def export_weights(run: Run, step: int, state: TrainState, recorded: Mapping) -> list[str]:
    """Write `hf/STEP` in the dtype of activations, adapters merged; return warnings.

    state: in stored order. recorded: as in checkpoints. A failure is a warning. To be called by all
    processes.
    """
    workdir, dtype = run.workdir, run.config.train.activation_dtype
    origin = RunOrigin(step=step, recorded=recorded, workdir=workdir)
    model = state.whole
    if state.adapters is not None:
        model = _merge(model, dtype=jnp.dtype(dtype))
    try:
        export = Export(
            source=ModelSource(model, model.config),
            model=model.config,
            tokenizer=load_recorded(workdir / TOKENIZER, recorded["tokenizer"], of=workdir),
            card=lambda: model_card(model.config, run.name, run=origin),
        )
        return write_hf(export, workdir / "hf" / str(step), dtype=dtype, overwrite=True)
    except UserError as error:
        return [f"step {step} was not exported: {error}"]


def write_adapters(run: Run, base: Weights) -> list[str]:
    """Write the adapters of the newest checkpoint as `peft/`; return warnings.

    base: the weights that they belong to. Where the run ends with another rotary scaling than
    theirs, nothing is written: PEFT computes with the base's. To be called by all processes.
    """
    target, weights = run.workdir / "peft", base.path
    ours = run.setup.at(run.config.train.steps).config.model.rope_scaling
    if ours != base.model.rope_scaling:
        return [
            f"{target} is not written: the adapters were trained with rope_scaling {show(ours)}, "
            f"and PEFT takes that of the base, {show(base.model.rope_scaling)}; merge them: "
            f"python -m llamajax.convert --from={run.workdir} --to=DIRECTORY"
        ]
    with store_errors_explained(run.checkpointer.directory):
        checkpoint = newest_checkpoint(run.checkpointer.directory)
    origin = RunOrigin(step=checkpoint.step, recorded=checkpoint.meta, workdir=run.workdir)
    named = hub_name(weights, run.config.train.base_model)
    card = model_card(base.model, run.name, run=origin, is_peft=True)
    write_peft(checkpoint, target, lora=run.config.lora, base=weights, named=named, card=card)
    if named[0]:
        return []
    if (weights / "config.json").is_file():
        return [
            f"{target} names its base by the path {weights}, which other machines lack: write its "
            f'name on the hub as "base_model_name_or_path" into {target / "adapter_config.json"}; '
            "in later runs, set train.base_model"
        ]
    return [
        f"{target} names {weights} as its base, which PEFT cannot load, as it is no Hugging Face "
        f"directory: python -m llamajax.convert --from={weights} --to=DIRECTORY, then write that "
        f'directory as "base_model_name_or_path" into {target / "adapter_config.json"}'
    ]
