"""Open a Hugging Face directory, and read any foreign tensors into the shards of a mesh.

Everything that can be refused is refused from headers, before memory is taken.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamajax.checkpoint.leaf_names import named_leaves, rebuild
from llamajax.checkpoint.stored_array import aligned_zeros, array_from_parts
from llamajax.config.schema import ModelConfig
from llamajax.errors import UserError, combine
from llamajax.files import read_json_object
from llamajax.formats.foreign_weights import (
    ForeignWeights,
    Index,
    TensorSource,
    check_finite,
    same_matrix,
)
from llamajax.formats.huggingface.hf_config import read_model_config
from llamajax.formats.huggingface.hf_names import ROWS, Row, tensors, their_index, to_ours
from llamajax.formats.huggingface.safetensors_files import (
    SafetensorsSource,
    TensorPlace,
    read_places,
)
from llamajax.sharding import is_weight, letters
from llamajax.tokenizers.loading import find_tokenizer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_DTYPES = ("bfloat16", "float16", "float32")
_LISTED = 10
# What torch.compile, DistributedDataParallel and PEFT put before the names of what they wrap.
_WRAPPERS = re.compile(r"^(_orig_mod\.|module\.|base_model\.model\.)+")
EMBEDDING, _HEAD = ROWS["embedding"].theirs, ROWS["head"].theirs
# Buffers that old versions of transformers stored beside the weights.
_IGNORED = ("rotary_emb.inv_freq",)


def recognize(path: Path) -> ForeignWeights | None:
    """Open a Hugging Face directory; return None for anything without its `config.json`.

    Raises UserError for a model that is not Llama's, and for missing or damaged files.
    """
    file = path / "config.json"
    if not file.is_file():
        return None
    config = read_json_object(file)
    if not config.keys() & {"model_type", "architectures"}:
        return None
    model, problems = read_model_config(config)
    source = None
    if not problems:
        source, problems = _open_files(path)
    if model is None or source is None:
        raise combine(problems, title=f"{path} cannot be read as a Llama of Hugging Face:")
    return ForeignWeights(model=model, tokenizer=find_tokenizer(path), source=source)


def _open_files(directory: Path) -> tuple[SafetensorsSource | None, list[str]]:
    """Return the tensors of a directory, or None and every problem with its files."""
    file_of: dict[str, Path] | None = None
    if (directory / SINGLE).is_file():
        files = [directory / SINGLE]
    elif (directory / INDEX).is_file():
        weight_map = read_json_object(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            return None, [f"{directory / INDEX} is not an index: no weight_map in it"]
        file_of = {name: directory / str(file) for name, file in weight_map.items()}
        files = sorted(set(file_of.values()))
    elif pickled := sorted(p.name for p in directory.glob("*model*.bin")):
        return None, [
            f"it has {pickled[0]}, pickled by PyTorch, which may run code when it is read, and no "
            f"{SINGLE}; save it as safetensors with transformers' save_pretrained first"
        ]
    else:
        return None, [f"there is neither {SINGLE} nor {INDEX} in it"]
    found: dict[str, TensorPlace] = {}
    problems = []
    for file in files:
        if not file.exists():
            problems.append(f"{file} is missing, and {INDEX} names it; copy or download it")
            continue
        try:
            for name, place in read_places(file).items():
                if file_of is not None and file_of.get(name, file) != file:
                    continue  # a stale copy
                if (plain := _WRAPPERS.sub("", name)) in found:
                    first = found[plain].file
                    problems.append(f"{file}: {name} is {plain}, which {first} holds too")
                found[plain] = place
        except UserError as error:
            problems.append(str(error))
    if file_of is not None and not problems:
        problems += [
            f"{name}: {INDEX} says it is in {file.name}, which does not hold it"
            for name, file in file_of.items()
            if _WRAPPERS.sub("", name) not in found
        ]
    return (None if problems else SafetensorsSource(found)), problems


def check_tensors(source: TensorSource, model: ModelConfig, *, path: Path) -> None:
    """Raise one UserError that lists missing, extra, misshapen and mistyped tensors."""
    problems = []
    wanted = {tensor.name: tensor.shape for tensor in tensors(model)}
    present = set(source.names())
    for name, shape in wanted.items():
        if name not in present:
            hint = " (config.json has tie_word_embeddings false)" if name == _HEAD else ""
            problems.append(f"{name}: missing{hint}")
        elif tuple(source.shape(name)) != shape:
            problems.append(
                f"{name}: {source.where(name)} has shape {list(source.shape(name))}, "
                f"the architecture {list(shape)}"
            )
        elif source.dtype(name).name not in WEIGHT_DTYPES:
            problems.append(
                f"{name}: {source.where(name)} has dtype {source.dtype(name).name}; "
                f"weights are {', '.join(WEIGHT_DTYPES)}"
            )
    extra = [n for n in source.names() if n not in wanted and not n.endswith(_IGNORED)]
    if model.tie_embeddings and _HEAD in extra:
        extra.remove(_HEAD)  # compared with the embedding when the weights are read
    problems += [f"{name}: not part of a Llama of this architecture" for name in extra]
    if problems:
        title = f"{path} does not hold the weights of its architecture:"
        raise combine(problems, title=title, listed=_LISTED)


def check_tied_head(source: TensorSource, model: ModelConfig) -> None:
    """Raise UserError when a tied model comes with a head of its own."""
    if not model.tie_embeddings or _HEAD not in source.names():
        return
    shape = (model.vocab_size, model.hidden_size)  # a stored head may have rows of padding
    if not same_matrix(source, _HEAD, EMBEDDING, shape=shape):
        raise UserError(
            f"{source.where(_HEAD)} holds a {_HEAD} that differs from {EMBEDDING}, but the config "
            "says that they are one (tie_word_embeddings true); set tie_word_embeddings to false "
            "in config.json if the head is right, or remove it"
        )


def load_tensors(source: TensorSource, model: ModelConfig, abstract_model: Any) -> Any:
    """Read a model like `abstract_model` (ShapeDtypeStructs with shardings) from a source.

    Each device's part is assembled on the host, layer by layer in the wanted dtype, from just the
    slices that it needs, and handed over before the next one: the host holds one part of one
    weight and one tensor at a time.
    """
    weights = named_weights(abstract_model)
    check_tied_head(source, model)
    leaves = {
        name: array_from_parts(weight.get_value(), _reader(source, ROWS[name], weight, model))
        for name, weight in weights.items()
    }
    return rebuild(abstract_model, leaves)


def named_weights(model: Any) -> dict[str, Any]:
    """Return the declared weights of a model by name: each an array (or its shape) and letters."""
    weights = jax.tree.leaves(model, is_leaf=is_weight)
    return dict(zip(named_leaves(model), weights, strict=True))


def _reader(
    source: TensorSource, row: Row, weight: Any, model: ModelConfig
) -> Callable[[Index], np.ndarray]:
    """Return what reads a part (slices with bounds) of our weight; padding rows are 0."""
    dims, dtype = letters(weight), weight.get_value().dtype

    def fill(out: np.ndarray, layer: int | None, dims: str, index: Index) -> None:
        name = row.theirs.format(layer)
        theirs = source.read(name, their_index(row, dims, index, model))
        check_finite(theirs, source, name)
        ours = to_ours(theirs, row, dims, model)
        out[: ours.shape[0]] = ours.astype(dtype, copy=False)

    def read(index: Index) -> np.ndarray:
        part = aligned_zeros(tuple(s.stop - s.start for s in index), dtype)
        if dims[0] != "L":
            fill(part, None, dims, index)
            return part
        for position, layer in enumerate(range(index[0].start, index[0].stop)):
            fill(part[position], layer, dims[1:], index[1:])
        return part

    return read
