"""The one table of Hugging Face's Llama: its tensor names and layouts beside ours, both ways.

A layout writes one tensor's dimensions in the letters of `ModelConfig.dims`, blanks between them:
`NH D` is a matrix whose rows are heads times head size. Theirs are (out, in) as in PyTorch, and
half-split for the rotary embedding, as ours are. So only reshaping, transposing and the padding of
the vocabulary differ.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from llamajax.config.schema import ModelConfig
from llamajax.formats.foreign_weights import Index


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight: our name in the model, their name (`{}`: number of the layer), their layout."""

    ours: str
    theirs: str
    layout: str


TABLE = (
    Row("embedding", "model.embed_tokens.weight", "V D"),
    Row("blocks/attention_norm", "model.layers.{}.input_layernorm.weight", "D"),
    Row("blocks/attention/query", "model.layers.{}.self_attn.q_proj.weight", "NH D"),
    Row("blocks/attention/key", "model.layers.{}.self_attn.k_proj.weight", "KH D"),
    Row("blocks/attention/value", "model.layers.{}.self_attn.v_proj.weight", "KH D"),
    Row("blocks/attention/out", "model.layers.{}.self_attn.o_proj.weight", "D NH"),
    Row("blocks/mlp_norm", "model.layers.{}.post_attention_layernorm.weight", "D"),
    Row("blocks/mlp/gate", "model.layers.{}.mlp.gate_proj.weight", "F D"),
    Row("blocks/mlp/up", "model.layers.{}.mlp.up_proj.weight", "F D"),
    Row("blocks/mlp/down", "model.layers.{}.mlp.down_proj.weight", "D F"),
    Row("norm", "model.norm.weight", "D"),
    Row("head", "lm_head.weight", "V D"),
)
ROWS = {row.ours: row for row in TABLE}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor: its name and shape, and the row and layer that it belongs to."""

    name: str
    shape: tuple[int, ...]
    row: Row
    layer: int | None


def tensors(model: ModelConfig) -> Iterator[Tensor]:
    """Yield every tensor of a Hugging Face Llama of this architecture, layer by layer."""
    dims = model.dims | {"V": model.vocab_size}
    stacked = [row for row in TABLE if "{}" in row.theirs]
    rows: list[tuple[Row, int | None]] = [(ROWS["embedding"], None)]
    rows += [(row, layer) for layer in range(model.num_layers) for row in stacked]
    rows += [(ROWS["norm"], None)]
    rows += [] if model.tie_embeddings else [(ROWS["head"], None)]
    for row, layer in rows:
        shape = tuple(math.prod(dims[d] for d in group) for group in row.layout.split())
        yield Tensor(row.theirs.format(layer), shape, row, layer)


def their_index(row: Row, letters: str, index: Index, model: ModelConfig) -> Index:
    """Return the part of their tensor that holds `index` (slices with bounds) of ours, per layer.

    Ours has dims `letters`. Within a group such as NH only the first letter may be split.
    Rows that pad the vocabulary are not in theirs and left out.
    """
    dims, found = model.dims, []
    wanted = dict(zip(letters, index, strict=True))
    for first, *rest in row.layout.split():
        for letter in rest:
            assert wanted[letter] == slice(0, dims[letter]), f"{row.theirs}: {letter} is split"
        inner, stop = math.prod(dims[letter] for letter in rest), wanted[first].stop
        stop = min(stop, model.vocab_size) if first == "V" else stop
        found.append(slice(min(wanted[first].start, stop) * inner, stop * inner))
    return tuple(found)


def to_ours(theirs: np.ndarray, row: Row, letters: str, model: ModelConfig) -> np.ndarray:
    """View (a part of) their tensor in our layout, dims `letters`, without padding rows."""
    dims, expanded = model.dims, row.layout.replace(" ", "")
    shape: list[int] = []
    for group, size in zip(row.layout.split(), theirs.shape, strict=True):
        inner = [dims[d] for d in group[1:]]
        shape += [size // math.prod(inner), *inner]
    return theirs.reshape(shape).transpose([expanded.index(d) for d in letters])


def to_theirs(ours: np.ndarray, row: Row, letters: str, model: ModelConfig) -> np.ndarray:
    """Copy one layer of our weight (dims `letters`) to their layout, without padding rows."""
    expanded = row.layout.replace(" ", "")
    array = ours.transpose([letters.index(d) for d in expanded])
    if expanded[0] == "V":
        array = array[: model.vocab_size]
    sizes = dict(zip(expanded, array.shape, strict=True))
    return np.ascontiguousarray(array).reshape(
        [math.prod(sizes[d] for d in group) for group in row.layout.split()]
    )
