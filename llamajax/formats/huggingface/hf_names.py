"""The one table of a Llama's tensors: Hugging Face's names and layouts beside ours, both ways.

A layout writes one tensor's dimensions in the letters of `ModelConfig.dims`, blanks between them:
`NH D` is a matrix whose rows are heads times head size. Theirs are (out, in) as in PyTorch, and
half-split for the rotary embedding, as ours are. So only reshaping, transposing and the padding of
the vocabulary differ.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

from llamajax.config.schema import ModelConfig
from llamajax.formats.foreign_weights import Index


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight: our name in the model, Hugging Face's name and layout, the names of others.

    Names of others are without the number of the layer and without `.weight`.
    """

    ours: str
    in_hugging_face: str
    layout: str
    in_gguf: str
    in_meta: str

    @property
    def theirs(self) -> str:
        """Hugging Face's whole name; `{}` stands for the number of the layer."""
        layer = "model.layers.{}." if self.ours.startswith("blocks/") else ""
        return f"{layer}{self.in_hugging_face}.weight"

    def gguf_name(self, layer: int | str | None) -> str:
        """Return the name in a GGUF file."""
        return f"{self.in_gguf if layer is None else f'blk.{layer}.{self.in_gguf}'}.weight"

    def meta_name(self, layer: int | str | None) -> str:
        """Return the name that Meta's files give to this weight, of one layer or of none."""
        return f"{self.in_meta if layer is None else f'layers.{layer}.{self.in_meta}'}.weight"


def find_row(name: str, name_of: Callable[[Row, str | None], str]) -> tuple[Row | None, str]:
    """Return the row and the Hugging Face name of a tensor of another format; None: not a Llama's.

    name_of: `Row.gguf_name` or `Row.meta_name`.
    """
    layer = found[1] if (found := re.search(r"\.(\d+)\.", name)) else None
    for row in TABLE:
        if ("{}" in row.theirs) == (layer is not None) and name_of(row, layer) == name:
            return row, row.theirs.format(layer)
    return None, name


TABLE = (
    Row("embedding", "model.embed_tokens", "V D", "token_embd", "tok_embeddings"),
    Row("blocks/attention_norm", "input_layernorm", "D", "attn_norm", "attention_norm"),
    Row("blocks/attention/query", "self_attn.q_proj", "NH D", "attn_q", "attention.wq"),
    Row("blocks/attention/key", "self_attn.k_proj", "KH D", "attn_k", "attention.wk"),
    Row("blocks/attention/value", "self_attn.v_proj", "KH D", "attn_v", "attention.wv"),
    Row("blocks/attention/out", "self_attn.o_proj", "D NH", "attn_output", "attention.wo"),
    Row("blocks/mlp_norm", "post_attention_layernorm", "D", "ffn_norm", "ffn_norm"),
    Row("blocks/mlp/gate", "mlp.gate_proj", "F D", "ffn_gate", "feed_forward.w1"),
    Row("blocks/mlp/up", "mlp.up_proj", "F D", "ffn_up", "feed_forward.w3"),
    Row("blocks/mlp/down", "mlp.down_proj", "D F", "ffn_down", "feed_forward.w2"),
    Row("norm", "model.norm", "D", "output_norm", "norm"),
    Row("head", "lm_head", "V D", "output", "output"),
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
