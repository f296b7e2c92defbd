"""Adapters as Hugging Face's PEFT has them: adapter_config.json and adapter_model.safetensors.

PEFT has (R, in) and (out, R), one pair a layer, in the layout of Hugging Face's matrices.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamajax.checkpoint.location import Location
from llamajax.checkpoint.restore import Checkpoint
from llamajax.config.schema import LoraConfig, ModelConfig
from llamajax.errors import UserError, combine
from llamajax.files import read_json_object, replaced_directory
from llamajax.formats.foreign_weights import check_finite
from llamajax.formats.huggingface.hf_names import TABLE, tensors
from llamajax.formats.huggingface.hf_read import EMBEDDING, WEIGHT_DTYPES
from llamajax.formats.huggingface.hf_write import write_json
from llamajax.formats.huggingface.model_card import CARD, edited_card
from llamajax.formats.huggingface.safetensors_files import (
    SafetensorsSource,
    read_metadata,
    read_places,
    write_safetensors,
)
from llamajax.formats.llama_sources import Pair, pairs_of, read_factors

CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_BASE = "base_directory"  # our key in the tensors' metadata
_PREFIX = "base_model.model."
# What changes the model in another way than W + scale * B A (LoraConfig of PEFT 0.21).
_REFUSED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "target_parameters",
    "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
# Initial values that leave the base as it is; the others (pissa, olora, ...) subtract from it.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftAdapters:
    """Adapters by the tensor that they are added to, and tensors that were trained as a whole."""

    pairs: Mapping[str, Pair]
    replaced: SafetensorsSource
    fingerprint: str


def is_peft(path: Path) -> bool:
    """Return whether a directory holds adapters, and no whole model beside them."""
    return (path / CONFIG).is_file() and not any(path.glob("model*.safetensors"))


def read_peft_config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises UserError that names all that cannot be folded in."""
    file = path / CONFIG
    config = read_json_object(file)
    problems = [f"{key} is {config[key]!r}" for key in _REFUSED if config.get(key)]
    if (kind := config.get("peft_type")) != "LORA":
        problems.append(f"peft_type is {kind!r}; only LORA is read")
    if (bias := config.get("bias", "none")) != "none":
        problems.append(f"bias is {bias!r}; a Llama has no biases")
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str | None):
        problems.append(f"base_model_name_or_path is {name!r}; it must be a directory's name")
    if (init := config.get("init_lora_weights")) not in _PLAIN_INITS:
        problems.append(f"init_lora_weights is {init!r}, which changes the base's matrices as well")
    numbers = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha")}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            problems.append(f"{key} is {patterns!r}; it must be an object of names and numbers")
            continue
        numbers |= {f"{key}[{name!r}]": value for name, value in patterns.items()}
        for name in patterns:
            try:
                re.compile(name)
            except re.error as error:
                problems.append(f"{key} has {name!r}, no regular expression ({error})")
    for key, value in numbers.items():
        if not isinstance(value, int | float) or not value > 0:
            problems.append(f"{key} is {value!r}; it must be a number above 0")
    if problems:
        title = (
            f"{file}: these adapters cannot be added to their base here; merge them with PEFT's "
            "merge_and_unload, save that, and name its directory:"
        )
        raise combine(problems, title=title)
    return config


def find_base(path: Path, config: Mapping[str, Any]) -> Path:
    """Return the directory of the base's weights, as seen from here or from the adapters.

    Ours name it beside a name on the hub. Raises UserError where there is none.
    """
    name = config.get("base_model_name_or_path")
    ours = read_metadata(path / _TENSORS).get(_BASE)
    for found in (os.path.expanduser(name), path / name, ours) if name else ():
        if found and os.path.exists(found):  # False for a name that is too long
            return Path(found)
    fix = f'write the directory of the base as "base_model_name_or_path" into {path / CONFIG}'
    if not name:
        raise UserError(f"{path} holds adapters that do not say which base they belong to; {fix}")
    if not Path(name).is_absolute():
        fix = f"download it (hf download {name} --local-dir DIRECTORY), then {fix}"
    raise UserError(
        f"{path} holds adapters only, and there is no directory {name}, their base; {fix}"
    )


def open_adapters(path: Path, config: Mapping[str, Any], model: ModelConfig) -> PeftAdapters:
    """Read the adapters of a PEFT directory for a base of this architecture.

    Raises one UserError with every tensor that does not fit.
    """
    file = path / _TENSORS
    if not file.is_file():
        raise UserError(
            f"{path} has no {_TENSORS}; save the adapters as safetensors (save_pretrained of PEFT)"
        )
    places = {name.removeprefix(_PREFIX): place for name, place in read_places(file).items()}
    source, whole = SafetensorsSource(places), {}
    shapes = {tensor.name: tensor.shape for tensor in tensors(model)}
    if model.tie_embeddings:  # PEFT would make two matrices of one
        del shapes[EMBEDDING]
    modules, problems = [], []
    for name, place in places.items():
        module = name.partition(".lora_")[0]
        wanted = shapes.get(f"{module}.weight", ())
        sides = [f"{module}.lora_{which}.weight" for which in "AB"]
        if place.dtype.name not in WEIGHT_DTYPES:
            problems.append(f"{name}: dtype {place.dtype.name}")
        elif name == sides[1] and sides[0] in places:
            continue  # with its A
        elif name == sides[0] and sides[1] in places and len(wanted) == 2:
            rank = _in_pattern(config, "rank_pattern", module, config["r"])
            due, found = [(rank, wanted[1]), (wanted[0], rank)], [places[s].shape for s in sides]
            modules.append((module, sides, rank))
            if found != due:
                problems.append(f"{module}: A and B have shapes {found}, the base needs {due}")
        elif shapes.get(name) == place.shape:
            whole[name] = place
        else:
            problems.append(f"{name}: shape {list(place.shape)}, no part of adapters for this base")
    if problems:
        raise combine(problems, title=f"{file} does not fit its base:", listed=10)
    pairs = {}
    for module, sides, rank in modules:
        for name in sides:
            check_finite(source.read(name), source, name)
        a, b = (source.read(name).astype(np.float32) for name in sides)
        alpha = _in_pattern(config, "alpha_pattern", module, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        pairs[f"{module}.weight"] = Pair(a, b, scale)
    content = file.read_bytes() + json.dumps(config, sort_keys=True).encode()
    return PeftAdapters(
        pairs=pairs,
        replaced=SafetensorsSource(whole),
        fingerprint=hashlib.sha256(content).hexdigest(),
    )


def _in_pattern(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """Return the value for a module: of the first pattern that its last names match, as in PEFT."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def write_peft(
    checkpoint: Checkpoint,
    target: Path,
    *,
    lora: LoraConfig,
    base: Location,
    named: tuple[str | None, str | None],
    card: bytes,
) -> None:
    """Write the adapters of one of our checkpoints as a PEFT directory, complete or not at all.

    base: the weights that they belong to, which PEFT loads with transformers. named: their name and
    revision on the hub. To be called by all processes; process 0 writes. Raises UserError when the
    disk refuses.
    """
    pairs = pairs_of(read_factors(checkpoint), lora)
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
        "base_model_name_or_path": named[0] or str(base),
        "revision": named[1],
        "r": lora.rank,
        "lora_alpha": lora.alpha,  # PEFT scales by lora_alpha / r, as we do
        "lora_dropout": lora.dropout,
        "target_modules": [modules[target] for target in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    arrays = {}
    for name, pair in pairs.items():
        name = _PREFIX + name.removesuffix(".weight")
        arrays |= {f"{name}.lora_A.weight": pair.a, f"{name}.lora_B.weight": pair.b}
    with replaced_directory(target) as hidden:
        shapes = {name: array.shape for name, array in arrays.items()}
        values, metadata = iter(arrays.values()), {_BASE: str(base)}
        write_safetensors(hidden / _TENSORS, shapes, np.dtype("float32"), values, **metadata)
        write_json(hidden / CONFIG, config)
        old = edited_card(target)
        (hidden / CARD).write_bytes(card if old is None else old)
