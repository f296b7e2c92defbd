"""Writing a Hugging Face directory, tensor after tensor, from a file or from a model in memory.

The host holds one tensor at a time. Weights go out in the order of the table, all layers of one
before the next, because that is how ours are stacked.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamajax.config.schema import ModelConfig
from llamajax.errors import UserError
from llamajax.files import check_target, replaced_directory
from llamajax.formats.foreign_weights import Index, TensorSource, check_finite
from llamajax.formats.huggingface.hf_config import write_model_config
from llamajax.formats.huggingface.hf_names import TABLE, Tensor, tensors, to_theirs
from llamajax.formats.huggingface.hf_read import INDEX, SINGLE, check_tied_head, named_weights
from llamajax.formats.huggingface.safetensors_files import write_file
from llamajax.processes.host_collectives import raise_together
from llamajax.sharding import letters
from llamajax.tokenizers import Tokenizer
from llamajax.tokenizers.tokenizer_identity import check_vocabulary

MAX_SHARD_BYTES = 4_000_000_000
GENERATION = "generation_config.json"


class Progress(Protocol):
    """Is told how many of all bytes are done."""

    def __call__(self, done: int, total: int) -> None: ...


class ModelSource:
    """A model in memory, possibly sharded over processes, as a TensorSource.

    `read` gathers one layer of one weight and is to be called by all processes.
    """

    def __init__(self, model: Any, config: ModelConfig):
        self._weights, self._config = named_weights(model), config
        self._tensors = {tensor.name: tensor for tensor in tensors(config)}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._weights[self._tensors[name].row.ours].get_value().dtype)

    def where(self, name: str) -> str:
        return "the model in memory"

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        tensor = self._tensors[name]
        weight = self._weights[tensor.row.ours]
        array = _on_host(weight.get_value(), tensor.layer)
        dims = letters(weight).removeprefix("L")
        theirs = to_theirs(array, tensor.row, dims, self._config)
        return theirs if index is None else theirs[index]

    def close(self) -> None:
        """Nothing is open."""


def _on_host(array: jax.Array, layer: int | None) -> np.ndarray:
    """One layer of a stacked weight, or a whole one, on every process."""
    mesh = getattr(array.sharding, "mesh", None)
    if mesh is None or mesh.size == 1:
        return np.asarray(array if layer is None else array[layer])
    return np.asarray(_gathered(array, layer or 0, stacked=layer is not None, mesh=mesh))


@jax.jit(static_argnames=("stacked", "mesh"))
def _gathered(array: jax.Array, layer: int, *, stacked: bool, mesh: Mesh) -> jax.Array:
    if stacked:
        array = jax.lax.dynamic_index_in_dim(array, layer, axis=0, keepdims=False)
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec()))


def export_hf(
    model: Any,
    config: ModelConfig,
    directory: Path,
    *,
    dtype: str,
    tokenizer: Tokenizer | None,
    overwrite: bool = False,
) -> list[str]:
    """Write a model in memory as a Hugging Face directory; returns warnings.

    To be called by all processes; process 0 writes. See `write_hf`.
    """
    return write_hf(
        ModelSource(model, config),
        config,
        directory,
        dtype=dtype,
        tokenizer=tokenizer,
        overwrite=overwrite,
    )


def write_hf(
    source: TensorSource,
    model: ModelConfig,
    directory: Path,
    *,
    dtype: str,
    tokenizer: Tokenizer | None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> list[str]:
    """Write weights and tokenizer as a directory that stock transformers loads; returns warnings.

    dtype: of the files, bfloat16, float16 or float32. The directory appears whole or not at all.
    Raises UserError, on all processes, when it cannot be written, and for what does not fit:
    a tokenizer with more tokens than the model, a value beyond float16.
    """
    check_vocabulary(tokenizer, model.vocab_size)
    check_tied_head(source, model)
    files = plan_files(model, np.dtype(jax.numpy.dtype(dtype)), max_shard_bytes)
    arrays = _arrays(source, files, progress)
    failure, warnings = None, _unloadable(model)
    if jax.process_index() == 0:
        try:
            needed = sum(file.num_bytes for file in files)
            check_target(directory, overwrite=overwrite, needed_bytes=needed)
            with replaced_directory(directory) as hidden:
                _write_weights(hidden, files, arrays)
                warnings += _write_rest(hidden, model, dtype=dtype, tokenizer=tokenizer)
        except UserError as error:
            failure = error
    try:
        if jax.process_count() > 1:
            collections.deque(arrays, maxlen=0)  # the other processes wait in gathers for this one
    except UserError as error:
        failure = error  # the first process met it too: no one is left waiting
    raise_together(failure)
    return warnings


def _unloadable(model: ModelConfig) -> list[str]:
    """What transformers 5 refuses, though it could compute it."""
    if model.hidden_size % model.num_heads == 0:
        return []
    return [
        f"transformers loads no model whose hidden_size ({model.hidden_size}) is not a multiple of "
        f"num_heads ({model.num_heads}); llamajax reads this directory"
    ]


@dataclasses.dataclass(frozen=True)
class PlannedFile:
    """One safetensors file: its name, and what stands in it."""

    name: str
    tensors: tuple[Tensor, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(t.shape) for t in self.tensors) * self.dtype.itemsize


def plan_files(model: ModelConfig, dtype: np.dtype, max_shard_bytes: int) -> list[PlannedFile]:
    """The files of a model, none larger than `max_shard_bytes` unless one tensor is."""
    order = sorted(tensors(model), key=lambda tensor: TABLE.index(tensor.row))
    groups: list[list[Tensor]] = [[]]
    room = max_shard_bytes
    for tensor in order:
        size = math.prod(tensor.shape) * dtype.itemsize
        if size > room and groups[-1]:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(tensor)
        room -= size
    if len(groups) == 1:
        return [PlannedFile(SINGLE, tuple(groups[0]), dtype)]
    names = [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    return [PlannedFile(n, tuple(g), dtype) for n, g in zip(names, groups, strict=True)]


def _arrays(
    source: TensorSource, files: Sequence[PlannedFile], progress: Progress | None
) -> Iterator[np.ndarray]:
    """Every tensor in the order of the files, converted. All processes go through it."""
    done, total = 0, sum(file.num_bytes for file in files)
    for file in files:
        for tensor in file.tensors:
            stored = source.read(tensor.name)
            check_finite(stored, source, tensor.name)
            array = _converted(stored, file.dtype, tensor.name)
            yield array
            done += array.nbytes
            if progress is not None:
                progress(done, total)


def _converted(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if dtype == np.float16 and not np.isfinite(converted).all() and np.isfinite(array).all():
        raise UserError(
            f"{name} holds values beyond float16's largest, 65504; use --dtype=bfloat16 or float32"
        )
    return converted


def _write_weights(
    directory: Path, files: Sequence[PlannedFile], arrays: Iterator[np.ndarray]
) -> None:
    for file in files:
        shapes = {tensor.name: tensor.shape for tensor in file.tensors}
        write_file(directory / file.name, shapes, file.dtype, arrays)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(file.num_bytes for file in files)},
            "weight_map": {tensor.name: file.name for file in files for tensor in file.tensors},
        }
        write_json(directory / INDEX, index)


def _write_rest(
    directory: Path, model: ModelConfig, *, dtype: str, tokenizer: Tokenizer | None
) -> list[str]:
    """config.json, generation_config.json and the tokenizer; returns warnings."""
    ids: dict[str, Any] = {}
    warnings = []
    if tokenizer is not None:
        from llamajax.tokenizers.tokenizer_export import export_tokenizer  # imports a library

        warnings = export_tokenizer(tokenizer, directory)
        ids = json.loads((directory / GENERATION).read_text("utf-8"))
    write_json(directory / "config.json", write_model_config(model, dtype=dtype, ids=ids))
    return warnings


def write_json(path: Path, content: Any) -> None:
    """Write a small JSON file as Hugging Face formats them."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
