"""The one table of a Llama's tensors: Hugging Face's names and layouts beside ours, both ways.

A layout writes one tensor's dimensions in the letters of `ModelConfig.dims`, blanks between them:
`NH D` is a matrix whose rows are heads times head size. Theirs are (out, in) as in PyTorch, and
half-split for the rotary embedding, as ours are. So only reshaping, transposing and the padding of
the vocabulary differ.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.config.schema import ModelConfig
from llamajax.errors import combine
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


def renamed_tensors(
    names: Iterable[str],
    name_of: Callable[[Row, str | None], str],
    open_tensor: Callable[[Row, str], Any],
    *,
    path: Path,
) -> dict[str, Any]:
    """Open the tensors `names` of another format; return them by Hugging Face's names.

    name_of: `Row.gguf_name` or `Row.meta_name`. open_tensor: raises ValueError for what cannot be
    read. Raises one UserError with all of these, and with what is no part of a Llama.
    """
    found, problems = {}, []
    for name in names:
        layer = number[1] if (number := re.search(r"\.(\d+)\.", name)) else None
        rows = (r for r in TABLE if ("{}" in r.theirs) == (layer is not None))
        row = next((row for row in rows if name_of(row, layer) == name), None)
        try:
            if row is None:
                raise ValueError("no part of a Llama language model")
            found[row.theirs.format(layer)] = open_tensor(row, name)
        except ValueError as error:
            problems.append(f"tensor {name}: {error}")
    if problems:
        raise combine(problems, title=f"{path}: tensors that cannot be imported:", listed=10)
    return found


def interleaved_rows(row: Row, num_rows: int, heads: tuple[int, int]) -> np.ndarray | None:
    """Return, for each row of Hugging Face's q or k, the row in files of Meta and llama.cpp.

    There rotary pairs are rows (i, i + 1) of a head; Hugging Face's and ours are half-split: (i, i
    + H/2). heads: numbers of query and kv heads. None for other weights, whose rows have one order.
    """
    num_heads = {"query": heads[0], "key": heads[1]}.get(row.ours.rpartition("/")[2])
    if num_heads is None:
        return None
    if num_rows % (2 * num_heads):
        raise ValueError(f"{num_rows} rows are no {num_heads} heads")
    return np.arange(num_rows).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)


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
