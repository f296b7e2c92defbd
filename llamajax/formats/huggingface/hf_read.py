"""Reading a Hugging Face directory, and any foreign tensors into the shards of a mesh.

Everything that can be refused is refused from headers, before memory is taken.
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamajax.checkpoint.leaf_names import named_leaves, rebuild
from llamajax.checkpoint.stored_array import aligned_zeros, array_from_parts
from llamajax.config.schema import ModelConfig
from llamajax.errors import UserError, combine
from llamajax.formats.foreign_weights import ForeignWeights, Index, TensorSource, check_finite
from llamajax.formats.huggingface.hf_config import read_model_config
from llamajax.formats.huggingface.hf_names import ROWS, Row, tensors, their_index, to_ours
from llamajax.formats.huggingface.safetensors_files import (
    DamagedFile,
    Entry,
    read_header,
    read_part,
)
from llamajax.sharding import is_weight, letters
from llamajax.tokenizers.loading import find_tokenizer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_DTYPES = ("bfloat16", "float16", "float32")
_LISTED = 10
# What torch.compile, DistributedDataParallel and PEFT put before the names of what they wrap.
_WRAPPERS = re.compile(r"^(_orig_mod\.|module\.|base_model\.model\.)+")
_EMBEDDING = ROWS["embedding"].theirs
# Buffers that old versions of transformers stored beside the weights.
_IGNORED = ("rotary_emb.inv_freq",)


class SafetensorsSource:
    """The tensors of one or several safetensors files; a TensorSource."""

    def __init__(self, files: dict[str, tuple[Path, Entry]]):
        self._files = files

    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name][1].shape

    def dtype(self, name: str) -> np.dtype:
        return self._files[name][1].dtype

    def where(self, name: str) -> str:
        return str(self._files[name][0])

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        path, entry = self._files[name]
        try:
            return read_part(path, entry, index)
        except DamagedFile as error:
            raise UserError(f"{path} {error}; copy or download it again") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None

    def close(self) -> None:
        """Nothing stays open between reads."""


def recognize(path: Path) -> ForeignWeights | None:
    """What a Hugging Face directory holds; None for anything without its `config.json`.

    Raises UserError for a model that is not Llama's, and for missing or damaged files.
    """
    config = read_config_json(path)
    if config is None:
        return None
    model, problems = read_model_config(config)
    source = None
    if not problems:
        source, problems = _open_files(path)
    if model is None or source is None:
        raise combine(problems, title=f"{path} cannot be read as a Llama of Hugging Face:")
    return ForeignWeights(model=model, tokenizer=find_tokenizer(path), source=source)


def read_config_json(path: Path) -> dict[str, Any] | None:
    """A directory's `config.json` if it is one of Hugging Face's. UserError when unreadable."""
    file = path / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is not readable as JSON ({error})") from None
    known = isinstance(config, dict) and ("model_type" in config or "architectures" in config)
    return config if known else None


def _open_files(directory: Path) -> tuple[SafetensorsSource | None, list[str]]:
    """The tensors of a directory, or None and every problem with its files."""
    places: dict[str, Path] | None = None
    if (directory / SINGLE).is_file():
        files = [directory / SINGLE]
    elif (directory / INDEX).is_file():
        try:
            weight_map = json.loads((directory / INDEX).read_text("utf-8"))["weight_map"]
            places = {name: directory / file for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return None, [f"{directory / INDEX} is not an index: no weight_map in it"]
        files = sorted(set(places.values()))
    else:
        return None, [_no_weights(directory)]
    found: dict[str, tuple[Path, Entry]] = {}
    problems = []
    for file in files:
        try:
            for name, entry in read_header(file).items():
                if places is not None and places.get(name, file) != file:
                    continue  # a stale copy
                if (plain := _WRAPPERS.sub("", name)) in found:
                    first = found[plain][0]
                    problems.append(f"{file}: {name} is {plain}, which {first} holds too")
                found[plain] = (file, entry)
        except FileNotFoundError:
            problems.append(f"{file} is missing, and {INDEX} names it; copy or download it")
        except OSError as error:
            problems.append(f"cannot read {file}: {error.strerror}")
        except DamagedFile as error:
            problems.append(f"{file} {error}; copy or download it again")
    if places is not None and not problems:
        problems += [
            f"{name}: {INDEX} says it is in {file.name}, which does not hold it"
            for name, file in places.items()
            if _WRAPPERS.sub("", name) not in found
        ]
    return (None if problems else SafetensorsSource(found)), problems


def _no_weights(directory: Path) -> str:
    others = sorted(p.name for p in directory.glob("*model*.bin"))
    if not others:
        return f"there is neither {SINGLE} nor {INDEX} in it"
    return (
        f"it has {others[0]}, pickled by PyTorch, which may run code when it is read, and no "
        f"{SINGLE}; save it as safetensors with transformers' save_pretrained first"
    )


def check_tensors(source: TensorSource, model: ModelConfig, *, path: Path) -> None:
    """Raise one UserError that lists missing, extra, misshapen and mistyped tensors."""
    problems = []
    wanted = {tensor.name: tensor.shape for tensor in tensors(model)}
    present = set(source.names())
    for name, shape in wanted.items():
        if name not in present:
            hint = (
                " (config.json has tie_word_embeddings false)" if name == "lm_head.weight" else ""
            )
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
    if model.tie_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")  # compared with the embedding when the weights are read
    problems += [f"{name}: not part of a Llama of this architecture" for name in extra]
    if problems:
        more = len(problems) - _LISTED
        shown = problems[:_LISTED] + ([f"and {more} more"] if more > 0 else [])
        raise combine(shown, title=f"{path} does not hold the weights of its architecture:")


def check_tied_head(source: TensorSource, model: ModelConfig) -> None:
    """Raise UserError when a tied model comes with a head of its own."""
    if not model.tie_embeddings or "lm_head.weight" not in source.names():
        return
    rows = 4096
    for start in range(0, model.vocab_size, rows):
        index = (slice(start, min(start + rows, model.vocab_size)), slice(0, model.hidden_size))
        head, embedding = (source.read(n, index) for n in ("lm_head.weight", _EMBEDDING))
        if not np.array_equal(head, embedding):
            raise UserError(
                f"{source.where('lm_head.weight')} holds a lm_head.weight that differs from "
                f"{_EMBEDDING}, but the config says that they are one (tie_word_embeddings true); "
                "set tie_word_embeddings to false in config.json if the head is right, or remove it"
            )


def load_tensors(source: TensorSource, model: ModelConfig, abstract_model: Any) -> Any:
    """A model like `abstract_model` (ShapeDtypeStructs with shardings), each leaf read from source.

    Each device's part is put together on the host, layer by layer in the wanted dtype, from just
    the slices that it needs, and handed over before the next one: the host holds one part of one
    weight and one tensor at a time.
    """
    weights = named_weights(abstract_model)
    _check_shapes(weights, model)
    check_tied_head(source, model)
    leaves = {
        name: _read_placed(source, ROWS[name], letters(weight), weight.get_value(), model)
        for name, weight in weights.items()
    }
    return rebuild(abstract_model, leaves)


def _check_shapes(weights: dict[str, Any], model: ModelConfig) -> None:
    """Raise UserError when the wanted model is of another architecture than the stored one."""
    problems = []
    for name, weight in weights.items():
        wanted = list(weight.get_value().shape)
        stored = [model.dims[d] for d in letters(weight)]
        if wanted != stored:
            problems.append(f"{name}: {stored} is stored, {wanted} is wanted")
    if model.tie_embeddings != ("head" not in weights):
        problems.append(f"model.tie_embeddings is {model.tie_embeddings} in what is stored")
    if problems:
        raise combine(problems[:_LISTED], title="the stored weights are of another architecture:")


def named_weights(model: Any) -> dict[str, Any]:
    """The declared weights of a model by name: an array or its shape, and its letters."""
    weights = jax.tree.leaves(model, is_leaf=is_weight)
    return dict(zip(named_leaves(model), weights, strict=True))


def _read_placed(
    source: TensorSource, row: Row, dims: str, wanted: jax.ShapeDtypeStruct, model: ModelConfig
) -> jax.Array:
    return array_from_parts(
        wanted, lambda index: read_weight(source, row, dims, index, wanted.dtype, model)
    )


def read_weight(
    source: TensorSource, row: Row, dims: str, index: Index, dtype: np.dtype, model: ModelConfig
) -> np.ndarray:
    """The part `index` (slices with bounds) of our weight with dims `dims`; padding rows are 0."""
    part = aligned_zeros(tuple(s.stop - s.start for s in index), dtype)
    if dims[0] != "L":
        _read_layer(source, row, None, dims, index, part, model)
        return part
    for position, layer in enumerate(range(index[0].start, index[0].stop)):
        _read_layer(source, row, layer, dims[1:], index[1:], part[position], model)
    return part


def _read_layer(source, row, layer, dims, index, out, model) -> None:
    """Fill `out` with the part `index` of one layer; padding rows stay as they are."""
    name = row.theirs.format(layer)
    theirs = source.read(name, their_index(row, dims, index, model))
    check_finite(theirs, source, name)
    ours = to_ours(theirs, row, dims, model)
    out[: ours.shape[0]] = ours.astype(out.dtype, copy=False)
