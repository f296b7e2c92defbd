"""Parameters and floating-point operations of a model, from its configuration alone.

`cost_analysis` of a compiled program counts a scanned block once, so operations are counted by
formula. One multiply-add is two operations.
"""

import math
from collections.abc import Iterable

from llamajax.config.schema import LORA_TARGETS, ModelConfig


def num_parameters(model: ModelConfig) -> int:
    """Return the number of weights; a tied head counts once."""
    norms = (2 * model.num_layers + 1) * model.hidden_size
    head = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    embedding = model.vocab_size * model.hidden_size
    return embedding + head + norms + model.num_layers * matrices_per_layer(model)


def flops_per_token(
    model: ModelConfig, seq_len: int, *, causal: bool, frozen: bool = False
) -> float:
    """Return the operations per trained token: matrix products, forward and backward (3 x forward).

    `causal` counts half of the attention matrix, the convention of fused causal kernels; without
    it the whole matrix counts. The embedding is a look-up and counts nothing; norms, rotary
    embedding, softmax and recomputation never count (PaLM, appendix B). `frozen`: weights have no
    gradient, so each costs two products and not three; adapters beside them are not counted.
    """
    head = model.vocab_size * model.hidden_size
    weights = head + model.num_layers * matrices_per_layer(model)
    # Scores (T x H . H x S) and the weighted values (T x S . S x H): 2 products, 2 operations.
    attention = 4 * seq_len * model.num_heads * model.head_size * model.num_layers
    return (4.0 if frozen else 6.0) * weights + 3.0 * (attention / 2 if causal else attention)


def matrices_per_layer(model: ModelConfig, names: Iterable[str] = LORA_TARGETS) -> int:
    """Return the number of weights in the matrices of one layer, all or those of these names."""
    return sum(math.prod(model.dims[d] for d in "".join(LORA_TARGETS[name])) for name in names)
