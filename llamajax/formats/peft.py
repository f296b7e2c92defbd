"""Write adapters as Hugging Face's PEFT reads them: adapter_config.json and safetensors.

PEFT has (R, in) and (out, R), one pair a layer, in the layout of Hugging Face's matrices. `in` and
`out` are our dims flattened, so nothing is permuted.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from llamajax.checkpoint.restore import Checkpoint
from llamajax.config.schema import LoraConfig
from llamajax.files import replaced_directory
from llamajax.formats.huggingface.hf_names import TABLE
from llamajax.formats.huggingface.hf_write import write_json
from llamajax.formats.huggingface.safetensors_files import write_safetensors
from llamajax.formats.llama_sources import Factors, read_factors


def write_peft(checkpoint: Checkpoint, target: Path, *, lora: LoraConfig, base: Path) -> None:
    """Write the adapters of one of our checkpoints as a PEFT directory, complete or not at all.

    base: directory of the weights that they belong to, which PEFT loads with transformers. To be
    called by all processes; process 0 writes. Raises UserError when the disk refuses.
    """
    arrays = _peft_tensors(read_factors(checkpoint))
    if jax.process_index() != 0:
        return
    modules = {
        row.ours.rpartition("/")[2]: row.theirs.split(".")[-2]
        for row in TABLE
        if "{}" in row.theirs
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,  # PEFT scales by lora_alpha / r, as we do
        "lora_dropout": lora.dropout,
        "target_modules": [modules[target] for target in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    with replaced_directory(target) as hidden:
        path = hidden / "adapter_model.safetensors"
        shapes = {name: array.shape for name, array in arrays.items()}
        write_safetensors(path, shapes, np.dtype("float32"), iter(arrays.values()))
        write_json(hidden / "adapter_config.json", config)


def _peft_tensors(factors: Mapping[str, Factors]) -> dict[str, np.ndarray]:
    """Return float32 tensors by the names that PEFT gives them."""
    found = {}
    for row in TABLE:
        pair = factors.get(row.ours.rpartition("/")[2])
        for layer in range(0 if pair is None else len(pair.a)):
            name = "base_model.model." + row.theirs.format(layer).removesuffix(".weight")
            a, b = pair.a[layer], pair.b[layer]
            found[f"{name}.lora_A.weight"] = a.reshape(-1, a.shape[-1]).T
            found[f"{name}.lora_B.weight"] = b.reshape(b.shape[0], -1).T
    return found
