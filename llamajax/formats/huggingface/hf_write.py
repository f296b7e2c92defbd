"""Write a Hugging Face directory, tensor after tensor, from a file or from a model in memory.

The host holds one tensor at a time. Weights go out in the order of the table, all layers of one
before the next, because that is how ours are stacked.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamajax.config.schema import ModelConfig
from llamajax.errors import UserError
from llamajax.files import check_target, replaced_directory
from llamajax.formats.foreign_weights import Export, TensorSource, read_as
from llamajax.formats.huggingface.hf_config import write_model_config
from llamajax.formats.huggingface.hf_names import TABLE, Tensor, tensors
from llamajax.formats.huggingface.hf_read import INDEX, SINGLE, check_tied_head
from llamajax.formats.huggingface.model_card import CARD, edited_card
from llamajax.formats.huggingface.safetensors_files import write_safetensors
from llamajax.processes.host_collectives import raise_together

MAX_SHARD_BYTES = 4_000_000_000
GENERATION = "generation_config.json"


def write_hf(
    export: Export,
    directory: Path,
    *,
    dtype: str,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write weights and tokenizer as a directory that stock transformers loads; return warnings.

    dtype: of the files, bfloat16, float16 or float32. progress: called with the bytes done and all
    bytes. The directory appears complete or not at all; a card in it that was edited stays. To be
    called by all processes; process 0 writes, and makes the card. Raises UserError, on all of them,
    when it cannot be written, and for a value beyond float16.
    """
    source, model = export.source, export.model
    check_tied_head(source, model)
    files = _plan_files(model, np.dtype(jax.numpy.dtype(dtype)), max_shard_bytes)
    arrays = _converted_tensors(source, files, progress)
    failure, warnings = None, list(_unlike_transformers(model))
    if jax.process_index() == 0:
        try:
            needed = sum(file.num_bytes for file in files)
            check_target(directory, overwrite=overwrite, needed_bytes=needed)
            with replaced_directory(directory) as hidden:
                _write_weights(hidden, files, arrays)
                ids: dict[str, Any] = {}
                if export.tokenizer is not None:
                    from llamajax.tokenizers.tokenizer_export import export_tokenizer  # slow

                    length = model.max_seq_len
                    warnings += export_tokenizer(export.tokenizer, hidden, max_length=length)
                    ids = json.loads((hidden / GENERATION).read_text("utf-8"))
                config = write_model_config(model, dtype=dtype, ids=ids)
                write_json(hidden / "config.json", config)
                if export.card is not None:
                    new, old = export.card(), edited_card(directory)
                    (hidden / CARD).write_bytes(new if old is None else old)
                    if old not in (None, new):
                        warnings.append(
                            f"{directory / CARD} was edited, so it stays, and may not be of these "
                            "weights; remove it for a new one"
                        )
        except UserError as error:
            failure = error
    try:
        if jax.process_count() > 1:
            collections.deque(arrays, maxlen=0)  # the other processes wait in gathers for this one
    except UserError as error:
        failure = error  # process 0 met it too, so no process is left waiting
    raise_together(failure)
    return warnings


def _unlike_transformers(model: ModelConfig) -> Iterator[str]:
    """Yield a warning for each way in which some version of transformers differs on this model."""
    if model.hidden_size % model.num_heads:  # transformers 5 refuses what it could compute
        yield (
            f"transformers loads no model whose hidden_size ({model.hidden_size}) is not a "
            f"multiple of num_heads ({model.num_heads}); llamajax reads this directory"
        )
    scaling = model.rope_scaling
    if scaling is not None and scaling.type == "yarn":
        ratio = model.max_seq_len / scaling.original_max_seq_len
        if ratio != scaling.factor:
            yield (
                f"transformers 4.51 to 4.55 scale by max_seq_len / original_max_seq_len = {ratio:g}"
                f", not by rope_scaling.factor = {scaling.factor:g}; later ones by factor"
            )
        if not scaling.truncate:
            yield (
                "transformers before 4.55 ignores rope_scaling.truncate = false, and begins and "
                "ends yarn's blend at whole pairs; load this directory with a later version"
            )


@dataclasses.dataclass(frozen=True)
class _PlannedFile:
    """One safetensors file: its name and its tensors."""

    name: str
    tensors: tuple[Tensor, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(t.shape) for t in self.tensors) * self.dtype.itemsize


def _plan_files(model: ModelConfig, dtype: np.dtype, max_shard_bytes: int) -> list[_PlannedFile]:
    """Plan the files of a model, none larger than `max_shard_bytes` unless one tensor is."""
    groups: list[list[Tensor]] = [[]]
    room = max_shard_bytes
    for tensor in sorted(tensors(model), key=lambda tensor: TABLE.index(tensor.row)):
        size = math.prod(tensor.shape) * dtype.itemsize
        if size > room and groups[-1]:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(tensor)
        room -= size
    names = [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    names = [SINGLE] if len(groups) == 1 else names
    return [_PlannedFile(n, tuple(g), dtype) for n, g in zip(names, groups, strict=True)]


def _converted_tensors(
    source: TensorSource, files: Sequence[_PlannedFile], progress: Callable[[int, int], None] | None
) -> Iterator[np.ndarray]:
    """Yield every tensor in the order of the files, converted. All processes consume it."""
    done, total = 0, sum(file.num_bytes for file in files)
    for file in files:
        for tensor in file.tensors:
            array = read_as(source, tensor.name, file.dtype)
            yield array
            done += array.nbytes
            if progress is not None:
                progress(done, total)


def _write_weights(
    directory: Path, files: Sequence[_PlannedFile], arrays: Iterator[np.ndarray]
) -> None:
    for file in files:
        shapes = {tensor.name: tensor.shape for tensor in file.tensors}
        write_safetensors(directory / file.name, shapes, file.dtype, arrays)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(file.num_bytes for file in files)},
            "weight_map": {tensor.name: file.name for file in files for tensor in file.tensors},
        }
        write_json(directory / INDEX, index)


def write_json(path: Path, content: Any) -> None:
    """Write a small JSON file as Hugging Face formats them."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
