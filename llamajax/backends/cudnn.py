"""cuDNN's fused attention over packed documents: the one place that touches JAX's private API.

JAX's public `jax.nn.dot_product_attention` can say "causal", but a document mask becomes a bias
tensor of T x S. cuDNN itself takes documents as lengths and offsets; JAX passes them on only in
`jax._src.cudnn.fused_attention_stablehlo`. We bind the two primitives of that module directly:

- its wrapper in jax 0.10 scales the offsets of keys by the number of *query* heads, which silently
  reads wrong tokens when queries are grouped (fixed later, jax-ml/jax pull request 39521); here we
  compute the offsets, for every version alike;
- its wrapper looks for a GPU while tracing, so that nothing could be lowered or planned without.

The parameters of these primitives change from release to release, hence the list of versions.
Checked by lowering for CUDA and reading the program; not yet run on a GPU.
"""

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llamajax.errors import UserError

# releases whose private module was read, and the parameters that they want besides the common ones
_SCORE_MODIFIER = {"score_mod_name": None, "score_mod_jaxpr": None}
_EXTRA_PARAMETERS: dict[tuple[int, ...], dict[str, Any]] = {
    (0, 10, 2): {},
    (0, 12, 0): _SCORE_MODIFIER,
}


class Documents(NamedTuple):
    """Where the documents of all rows lie, compacted to the left over the whole batch, int32.

    `lengths` (B, M): tokens, 0 where unused. `q_offsets`, `kv_offsets` (B, M + 1): the first
    element of each in the flattened queries and keys, one past the end where unused.
    """

    lengths: jax.Array
    q_offsets: jax.Array
    kv_offsets: jax.Array


def version_problems(version: str) -> list[str]:
    """Why cuDNN attention cannot be used with this release of JAX; empty where it can."""
    if _release(version) in _EXTRA_PARAMETERS:
        return []
    known = ", ".join(".".join(map(str, v)) for v in _EXTRA_PARAMETERS)
    return [
        f"cudnn attention over packed documents uses a private part of JAX that was checked with "
        f"jax {known}, not with {version}: install one of those, or choose "
        f"--config.train.attention=blocked"
    ]


def documents(segment_ids_BT: jax.Array, *, max_documents: int, q_stride: int, kv_stride: int):
    """`Documents` of the packed rows, and whether they fit into B * `max_documents` places.

    A document is a run of equal ids within a row; the padding at the end is one, too. Strides are
    the array elements of one token: heads times head size.
    """
    B, T = segment_ids_BT.shape
    assert B * T * q_stride < 2**31, "cuDNN's offsets are 32-bit: use a smaller local batch"
    before = jnp.concatenate([segment_ids_BT[:, :1] - 1, segment_ids_BT[:, :-1]], axis=1)
    is_start = (segment_ids_BT != before).reshape(B * T)
    places = B * (max_documents + 1)
    (starts,) = jnp.nonzero(is_start, size=places, fill_value=B * T)
    starts = starts.astype(jnp.int32)
    lengths = jnp.diff(starts)[: B * max_documents]
    shape = (B, max_documents + 1)
    found = Documents(
        lengths.reshape(B, max_documents),
        (starts * q_stride).reshape(shape),
        (starts * kv_stride).reshape(shape),
    )
    return found, jnp.sum(is_start, dtype=jnp.int32) <= B * max_documents


def forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, docs: Documents | None
) -> tuple[jax.Array, jax.Array]:
    """Output (B, T, N, H) and float32 row statistics (B * M, N, T) of causal attention."""
    module, parameters = _private(q_BTNH, docs)
    operands = (q_BTNH, k_BSKH, v_BSKH, *_operands(q_BTNH, docs))
    o, statistics = module._dot_product_attention_fwd_p.bind(
        *operands, is_training=True, **parameters
    )
    return o, statistics


def backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    docs: Documents | None,
    statistics: jax.Array,
    o_BTNH: jax.Array,
    do_BTNH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, from what `forward` returned and the gradient of its output."""
    module, parameters = _private(q_BTNH, docs)
    operands = (q_BTNH, k_BSKH, v_BSKH, *_operands(q_BTNH, docs), statistics, o_BTNH, do_BTNH)
    dq, dk, dv = module._dot_product_attention_bwd_p.bind(*operands, **parameters)
    return dq, dk, dv


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _operands(q_BTNH: jax.Array, docs: Documents | None) -> tuple[jax.Array, ...]:
    """bias, lengths and offsets of queries and keys, two page tables; empty arrays where unused."""
    unused = jnp.zeros(0, q_BTNH.dtype)
    if docs is None:
        return (unused,) * 7
    lengths = docs.lengths
    return (unused, lengths, lengths, docs.q_offsets, docs.kv_offsets, unused, unused)


def _private(q_BTNH: jax.Array, docs: Documents | None) -> tuple[ModuleType, dict[str, Any]]:
    """JAX's private module and the parameters common to both of its primitives."""
    if problems := version_problems(jax.__version__):
        raise UserError(problems[0])
    from jax._src.cudnn import fused_attention_stablehlo as module

    mask = module.MaskType.CAUSAL if docs is None else module.MaskType.PADDING_CAUSAL
    parameters = {
        "scale": q_BTNH.shape[-1] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, no gradient of it
        "mask_type": mask,
        "layout": module.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
        **_EXTRA_PARAMETERS[_release(jax.__version__)],
    }
    return module, parameters
