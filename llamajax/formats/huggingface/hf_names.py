"""The one table of Hugging Face's Llama: its tensor names and layouts beside ours, both ways.

A layout writes one tensor's dimensions in the letters of `ModelConfig.dims`, blanks between them:
`NH D` is a matrix whose rows are heads times head size. Theirs are (out, in) as PyTorch has them;
the two halves of a head that the rotary embedding turns together stand as in ours (half-split), so
that between the two there is nothing but reshaping, transposing and the padding of the vocabulary.
"""

import dataclasses
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
    """One tensor of theirs: its name and shape, and the row and layer that it belongs to."""

    name: str
    shape: tuple[int, ...]
    row: Row
    layer: int | None


def tensors(model: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of a Hugging Face Llama of this architecture, layer by layer."""
    dims = model.dims | {"V": model.vocab_size}

    def of(row: Row, layer: int | None) -> Tensor:
        groups = row.layout.split()
        shape = tuple(int(np.prod([dims[d] for d in group])) for group in groups)
        return Tensor(row.theirs.format(layer), shape, row, layer)

    stacked = [row for row in TABLE if "{}" in row.theirs]
    yield of(ROWS["embedding"], None)
    for layer in range(model.num_layers):
        for row in stacked:
            yield of(row, layer)
    yield of(ROWS["norm"], None)
    if not model.tie_embeddings:
        yield of(ROWS["head"], None)


def their_index(row: Row, letters: str, index: Index, model: ModelConfig) -> Index:
    """The part of their tensor that holds `index` (slices with bounds) of ours, per layer.

    Ours has dims `letters`. Within a group such as NH only the first letter may be split.
    Rows that pad the vocabulary are not in theirs and left out.
    """
    dims = model.dims
    wanted = dict(zip(letters, index, strict=True))

    def one(group: str) -> slice:
        first, *rest = group
        inner = 1
        for letter in rest:
            assert wanted[letter] == slice(0, dims[letter]), f"{row.theirs}: {letter} is split"
            inner *= dims[letter]
        stop = wanted[first].stop
        if first == "V":
            stop = min(stop, model.vocab_size)
        return slice(min(wanted[first].start, stop) * inner, stop * inner)

    return tuple(one(group) for group in row.layout.split())


def to_ours(theirs: np.ndarray, row: Row, letters: str, model: ModelConfig) -> np.ndarray:
    """A view of (a part of) their tensor in our layout, dims `letters`, without padding rows."""
    dims, expanded = model.dims, row.layout.replace(" ", "")
    shape: list[int] = []
    for group, size in zip(row.layout.split(), theirs.shape, strict=True):
        inner = [dims[d] for d in group[1:]]
        shape += [size // int(np.prod(inner, dtype=int)), *inner]
    return theirs.reshape(shape).transpose([expanded.index(d) for d in letters])


def to_theirs(ours: np.ndarray, row: Row, letters: str, model: ModelConfig) -> np.ndarray:
    """One layer of our weight (dims `letters`) in their layout, without padding rows; a copy."""
    expanded = row.layout.replace(" ", "")
    array = ours.transpose([letters.index(d) for d in expanded])
    if expanded[0] == "V":
        array = array[: model.vocab_size]
    sizes = dict(zip(expanded, array.shape, strict=True))
    return np.ascontiguousarray(array).reshape(
        [int(np.prod([sizes[d] for d in group])) for group in row.layout.split()]
    )
