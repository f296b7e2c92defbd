"""Write a Hugging Face directory, tensor after tensor, from a file or from a model in memory.

The host holds one tensor at a time. Weights go out in the order of the table, all layers of one
before the next, because that is how ours are stacked.
"""

import collections
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamajax.config.schema import ModelConfig
from llamajax.errors import UserError
from llamajax.files import check_target, replaced_directory
from llamajax.formats.foreign_weights import Export, read_as
from llamajax.formats.huggingface.hf_config import write_model_config
from llamajax.formats.huggingface.hf_names import TABLE, Tensor, tensors
from llamajax.formats.huggingface.hf_read import INDEX, SINGLE, check_tied_head
from llamajax.formats.huggingface.model_card import CARD, edited_card
from llamajax.formats.huggingface.safetensors_files import write_safetensors
from llamajax.models.counts import num_parameters
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
    model, numbers = export.model, np.dtype(jax.numpy.dtype(dtype))
    check_tied_head(export.source, model)
    files, total = _plan_files(model, numbers, max_shard_bytes), num_parameters(model)
    total *= numbers.itemsize

    def converted() -> Iterator[np.ndarray]:
        """Yield the tensors in the order of the files. All processes consume it."""
        done = 0
        for tensor in itertools.chain(*files.values()):
            array = read_as(export.source, tensor.name, numbers)
            yield array
            done += array.nbytes
            if progress is not None:
                progress(done, total)

    arrays, failure, warnings = converted(), None, list(_unlike_transformers(model))
    if jax.process_index() == 0:
        try:
            check_target(directory, overwrite=overwrite, needed_bytes=total)
            with replaced_directory(directory) as hidden:
                for name, held in files.items():
                    shapes = {tensor.name: tensor.shape for tensor in held}
                    write_safetensors(hidden / name, shapes, numbers, arrays)
                if len(files) > 1:
                    file_of = {tensor.name: name for name, held in files.items() for tensor in held}
                    index = {"metadata": {"total_size": total}, "weight_map": file_of}
                    write_json(hidden / INDEX, index)
                warnings += _write_small_files(hidden, export, dtype=dtype, old=directory)
        except UserError as error:
            failure = error
    try:
        if jax.process_count() > 1:
            collections.deque(arrays, maxlen=0)  # the other processes wait in gathers for this one
    except UserError as error:
        failure = error  # process 0 met it too, so no process is left waiting
    raise_together(failure)
    return warnings


def _write_small_files(directory: Path, export: Export, *, dtype: str, old: Path) -> list[str]:
    """Write all but the weights; return warnings. old: a directory whose edited card stays."""
    warnings, ids = [], {}
    if export.tokenizer is not None:
        from llamajax.tokenizers.tokenizer_export import export_tokenizer  # slow

        length = export.model.max_seq_len
        warnings += export_tokenizer(export.tokenizer, directory, max_length=length)
        ids = json.loads((directory / GENERATION).read_text("utf-8"))
    write_json(directory / "config.json", write_model_config(export.model, dtype=dtype, ids=ids))
    if export.card is not None:
        new, edited = export.card(), edited_card(old)
        (directory / CARD).write_bytes(new if edited is None else edited)
        if edited not in (None, new):
            warnings.append(
                f"{old / CARD} was edited, so it stays, and may not be of these weights; remove it "
                "for a new one"
            )
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


def _plan_files(
    model: ModelConfig, dtype: np.dtype, max_shard_bytes: int
) -> dict[str, list[Tensor]]:
    """Return the tensors of each file; none is larger than `max_shard_bytes` unless a tensor is."""
    groups: list[list[Tensor]] = [[]]
    room = max_shard_bytes
    for tensor in sorted(tensors(model), key=lambda tensor: TABLE.index(tensor.row)):
        size = math.prod(tensor.shape) * dtype.itemsize
        if size > room and groups[-1]:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(tensor)
        room -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def write_json(path: Path, content: Any) -> None:
    """Write a small JSON file as Hugging Face formats them."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
