"""Attention by a function of the user's, `train.attention = module:function` (docs/kernels.md).

It is called as `function(q, k, v, segment_ids=..., scale=..., causal=True)`, inside `jax.jit` and
`jax.shard_map`, with one device's rows and heads, and returns the output. `prove` compares it with
float64 NumPy; a run does so before it compiles.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from llamajax.config.user_code import errors_of_function, import_function
from llamajax.errors import combine
from llamajax.ops import references
from llamajax.ops.comparison import TOLERANCES, errors

_KEY = "train.attention"
# Tokens of the probes; a run with shorter sequences takes its own. The reference holds all scores.
# A longer run's last probe ends within a block of _BLOCK queries and keys where the run does.
_SHORT, _LONG, _BLOCK = 128, 1024, 512
# Queries of the probe with scores of about 100: exp overflows there in float32. Their rounding
# errors are as large: seen in right kernels 1.3e-5 in float32, and 4.7e-2 in bfloat16 for queries
# that are scaled in bfloat16. A softmax whose scores are clamped is off by 0.4.
_LARGE, _LARGE_TOLERANCE = 30, 10


def is_own(impl: str) -> bool:
    """Return whether an implementation of attention is a function of the user's."""
    return ":" in impl


def own_function(name: str) -> Callable[..., jax.Array]:
    """Import the function. Raises UserError where that fails."""
    return import_function(name, key=_KEY)


def own_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    name: str,
) -> jax.Array:
    """Compute `attention` with the user's function. Raises UserError where it cannot."""
    function = own_function(name)
    with errors_of_function(name, key=_KEY):
        return _call(function, q_BTNH, k_BSKH, v_BSKH, segment_ids_BT=segment_ids_BT)


def _call(function, q_BTNH, k_BSKH, v_BSKH, *, segment_ids_BT) -> jax.Array:
    scale = q_BTNH.shape[-1] ** -0.5
    o = function(q_BTNH, k_BSKH, v_BSKH, segment_ids=segment_ids_BT, scale=scale, causal=True)
    returned, wanted = (
        f"{getattr(x, 'dtype', type(x).__name__)} {getattr(x, 'shape', '')}" for x in (o, q_BTNH)
    )
    if returned != wanted:
        raise TypeError(f"it returned {returned}, the queries are {wanted}: make the output so")
    return o


def prove(
    name: str,
    *,
    dtype: str,
    heads: tuple[int, int],
    head_size: int,
    seq_len: int,
    packed: bool,
) -> tuple[str, bool]:
    """Try the function on this process's first device.

    Returns the largest errors in words, and whether it names what remat policies may keep.
    heads: of queries and of keys and values on a device, of which it tries two groups at the most.
    packed: whether rows hold several documents in training; each row is one as well, as in the
    canary. Raises UserError with every probe that is wrong.
    """
    function = own_function(name)
    long = seq_len if seq_len <= _LONG else _LONG - (-seq_len % _BLOCK)
    K = min(2, heads[1])
    N = heads[0] // heads[1] * K
    sizes = ((2, max(1, min(_SHORT, long // 2))), (1, long))
    largest, problems = np.zeros(4), []
    cases = [(*case, 1) for case in itertools.product(sizes, (False, True)[: 1 + packed])]
    cases.insert(1, (sizes[0], False, _LARGE))
    for (B, T), documents, factor in cases:
        words = f"{B} x {T} tokens{', packed documents' * documents}"
        words += f"{', scores of about 100' * (factor > 1)}, {N} heads of {head_size} on {K}"
        limit = TOLERANCES[dtype] * (_LARGE_TOLERANCE if factor > 1 else 1)
        ids_BT = _segment_ids(B, T) if documents else np.ones((B, T), np.int32)
        ids = jnp.asarray(ids_BT) if documents else None
        attend = functools.partial(_call, function, segment_ids_BT=ids)
        reference = functools.partial(references.attention, segment_ids_BT=ids_BT)
        arrays = [np.random.RandomState(n).randn(B, T, heads, head_size)
                  for n, heads in enumerate((N, K, K))]  # fmt: skip
        arrays[0] *= factor
        with errors_of_function(name, key=_KEY, case=f" with {words}"):
            found = errors(attend, reference, arrays, dtype=dtype, device=jax.local_devices()[0])
        named = zip(("output", "dq", "dk", "dv"), found, strict=True)
        if wrong := [f"{what} {error:.1e}" for what, error in named if not error <= limit]:
            problems.append(f"{words}: error of {', '.join(wrong)}; {limit:.0e} is allowed")
        if factor == 1:
            largest = np.maximum(largest, found)
    if problems:
        title = f"{_KEY} = {name} is wrong in {dtype}, by float64 NumPy (docs/kernels.md):"
        raise combine(problems, title=title)
    with errors_of_function(name, key=_KEY, case=f" with {words}"):
        program = jax.make_jaxpr(lambda *qkv: jax.vjp(attend, *qkv)[0])(
            *(jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays)
        )
    forward, backward = largest[0], max(largest[1:])
    words = f"{dtype} error {forward:.1e} forward, {backward:.1e} backward, against float64"
    return words, _names_attention(program.jaxpr)


def _names_attention(jaxpr: Any) -> bool:
    """Return whether a value has the checkpoint name "attention", in inner programs as well."""
    return any(
        (eqn.primitive.name == "name" and eqn.params["name"] == "attention")
        or any(map(_names_attention, jax.extend.core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _segment_ids(rows: int, tokens: int) -> np.ndarray:
    """Return documents that end at odd places, another one in each row, and padding at the end."""
    ids_BT = np.ones((rows, tokens), np.int32)
    for row in range(rows):
        ids_BT[row, tokens // (3 + row) :] = 2
        ids_BT[row, tokens // 2 + 3 * row + 1 :] = 3
    ids_BT[:, tokens - tokens // 16 :] = 0
    return ids_BT
