"""cuDNN's fused attention over packed documents, by two private primitives of JAX.

JAX's public `jax.nn.dot_product_attention` can say "causal", but a document mask becomes a bias
tensor of T x S. cuDNN itself takes documents as lengths and offsets; JAX passes them on only in
`jax._src.cudnn.fused_attention_stablehlo`. We bind the two primitives of that module directly:

- its wrapper in jax 0.10 scales the offsets of keys by the number of *query* heads, which silently
  reads wrong tokens when queries are grouped (fixed later, jax-ml/jax pull request 39521); here we
  compute the offsets, for every version alike;
- its wrapper looks for a GPU while tracing, so that nothing could be lowered or planned without.

The parameters of these primitives change from release to release: `problem` compares them.
Checked by lowering for CUDA and reading the program; not yet run on a GPU.
"""

import inspect
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llamajax.backends.jax_private import TESTED

# Operands and parameters as the CUDA lowering rules name them. The last two came with jax 0.12 and
# are passed as None where they exist; any other new parameter is one whose meaning we don't know.
_OPERANDS = ("query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets",
             "page_table_k", "page_table_v")  # fmt: skip
_RESIDUALS = ("activation", "fwd_output", "grad_output")
_PARAMETERS = ("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout",
               "sliding_window_length")  # fmt: skip
_OPTIONAL = ("score_mod_name", "score_mod_jaxpr")
_EXPECTED = {
    "fwd": [*_OPERANDS, *_PARAMETERS, "is_training"],
    "bwd": [*_OPERANDS, *_RESIDUALS, *_PARAMETERS],
}
_NAMES = ("_dot_product_attention_fwd_p.bind", "_dot_product_attention_bwd_p.bind",
          "MaskType.CAUSAL", "MaskType.PADDING_CAUSAL", "AttentionLayout.BTNH.value")  # fmt: skip


class Documents(NamedTuple):
    """Where the documents of all rows lie, compacted to the left over the whole batch, int32.

    `lengths` (B, M): tokens, 0 where unused. `starts` (B, M + 1): the first token of each in the
    flattened rows, one past the end where unused.
    """

    lengths: jax.Array
    starts: jax.Array


def _module() -> Any:
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _parameters(module: Any, direction: str) -> list[str]:
    """Return what a CUDA lowering rule takes, its context and `*score_mod_args` left out."""
    rule = getattr(module, f"_dot_product_attention_{direction}_cuda_lowering")
    taken = inspect.signature(rule).parameters.values()
    return [p.name for p in taken if p.kind is not p.VAR_POSITIONAL][1:]


def _difference() -> str | None:
    """Return the first thing in JAX's private module that is not as expected; None if all is."""
    try:
        module = _module()
        operator.attrgetter(*_NAMES)(module)
        for direction, expected in _EXPECTED.items():
            taken = [name for name in _parameters(module, direction) if name not in _OPTIONAL]
            if taken != expected:
                changed = sorted(set(taken) ^ set(expected)) or ["their order"]
                return f"parameters of {direction}: {', '.join(changed)}"
    except (ImportError, AttributeError) as error:
        return str(error)
    return None


def problem() -> str | None:
    """Return why this release of JAX cannot do cuDNN attention over documents; None if it can."""
    difference = _difference()
    return difference and (
        f"cudnn attention over packed documents uses a private part of JAX, which in jax "
        f"{jax.__version__} is not as in the releases that were tested ({difference}); install "
        f"one of those ({', '.join(TESTED['jax'])}), or choose --config.train.attention=blocked"
    )


def documents(segment_ids_BT: jax.Array, *, max_documents: int) -> Documents:
    """Return the `Documents` of packed rows, the first B * `max_documents` of them.

    A document is a run of equal ids within a row; the padding at the end is one, too.
    """
    B, T = segment_ids_BT.shape
    before = jnp.concatenate([segment_ids_BT[:, :1] - 1, segment_ids_BT[:, :-1]], axis=1)
    is_start = (segment_ids_BT != before).reshape(B * T)
    slots = B * (max_documents + 1)
    (starts,) = jnp.nonzero(is_start, size=slots, fill_value=B * T)
    starts = starts.astype(jnp.int32)
    lengths = jnp.diff(starts)[: B * max_documents].reshape(B, max_documents)
    return Documents(lengths, starts.reshape(B, max_documents + 1))


def forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, docs: Documents | None
) -> Sequence[jax.Array]:
    """Return output (B, T, N, H) and float32 row statistics (B * M, N, T) of causal attention.

    Until jax 0.10.1 results of the primitives do not say along which mesh axes they vary.
    """
    module, parameters = _bound(q_BTNH, docs)
    operands = (q_BTNH, k_BSKH, v_BSKH, *_operands(q_BTNH, k_BSKH, docs))
    return module._dot_product_attention_fwd_p.bind(*operands, is_training=True, **parameters)


def backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    docs: Documents | None,
    statistics: jax.Array,
    o_BTNH: jax.Array,
    do_BTNH: jax.Array,
) -> Sequence[jax.Array]:
    """Return the gradients of q, k and v, from the results of `forward` and do."""
    module, parameters = _bound(q_BTNH, docs)
    documents = _operands(q_BTNH, k_BSKH, docs)
    operands = (q_BTNH, k_BSKH, v_BSKH, *documents, statistics, o_BTNH, do_BTNH)
    return module._dot_product_attention_bwd_p.bind(*operands, **parameters)


def _operands(
    q_BTNH: jax.Array, k_BSKH: jax.Array, docs: Documents | None
) -> tuple[jax.Array, ...]:
    """Return bias, lengths and offsets of queries and keys, two page tables; empty if unused.

    Offsets count array elements: heads times head size for each token.
    """
    unused = jnp.zeros(0, q_BTNH.dtype)
    if docs is None:
        return (unused,) * 7
    assert q_BTNH.size < 2**31, "cuDNN's offsets are 32-bit: use a smaller local batch"
    lengths = docs.lengths
    q_offsets, kv_offsets = (docs.starts * (x.shape[2] * x.shape[3]) for x in (q_BTNH, k_BSKH))
    return (unused, lengths, lengths, q_offsets, kv_offsets, unused, unused)


def _bound(q_BTNH: jax.Array, docs: Documents | None) -> tuple[Any, dict[str, Any]]:
    """Return JAX's private module and the parameters common to both primitives."""
    module = _module()
    return module, {
        "scale": q_BTNH.shape[-1] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, no gradient of it
        "mask_type": module.MaskType.CAUSAL if docs is None else module.MaskType.PADDING_CAUSAL,
        "layout": module.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
        **{name: None for name in _parameters(module, "fwd") if name in _OPTIONAL},
    }
