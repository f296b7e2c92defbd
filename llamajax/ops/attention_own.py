"""Attention by a function of the user's, `train.attention = module:function` (docs/kernels.md).

It is called as `function(q, k, v, segment_ids=..., scale=..., causal=True)`, inside `jax.jit` and
`jax.shard_map`, with one device's rows and heads, and returns the output. `prove` compares it with
float64 NumPy; a run does so before it compiles.
"""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.config.user_code import errors_name_the_line, import_function
from llamajax.errors import UserError, combine
from llamajax.ops import references
from llamajax.ops.comparison import TOLERANCES, errors

_KEY = "train.attention"
# Tokens of the probes; a run with shorter sequences takes its own. The reference holds all scores.
_SHORT, _LONG = 128, 1024


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
    with _one_message(name):
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


@contextlib.contextmanager
def _one_message(name: str, case: str = "") -> Iterator[None]:
    """Turn what the function raises, its NotImplementedError as well, into one UserError."""
    file = sys.modules[name.partition(":")[0]].__file__
    try:
        with errors_name_the_line(file, Path(file).parent):
            yield
    except UserError as error:
        raise UserError(f"{_KEY} = {name} fails{case}: {error}") from error


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
    function, long = own_function(name), min(seq_len, _LONG)
    K = min(2, heads[1])
    N, limit = heads[0] // heads[1] * K, TOLERANCES[dtype]
    sizes = ((2, max(1, min(_SHORT, long // 2))), (1, long))
    largest, problems = np.zeros(4), []
    for (B, T), documents in itertools.product(sizes, (False, True)[: 1 + packed]):
        words = (
            f"{B} x {T} tokens{', packed documents' * documents}, {N} heads of {head_size} on {K}"
        )
        ids_BT = _segment_ids(B, T) if documents else np.ones((B, T), np.int32)
        ids = jnp.asarray(ids_BT) if documents else None
        attend = functools.partial(_call, function, segment_ids_BT=ids)
        reference = functools.partial(references.attention, segment_ids_BT=ids_BT)
        arrays = [np.random.RandomState(n).randn(B, T, heads, head_size)
                  for n, heads in enumerate((N, K, K))]  # fmt: skip
        with _one_message(name, f" with {words}"):
            found = errors(attend, reference, arrays, dtype=dtype, device=jax.local_devices()[0])
        named = zip(("output", "dq", "dk", "dv"), found, strict=True)
        if wrong := [f"{what} {error:.1e}" for what, error in named if not error <= limit]:
            problems.append(f"{words}: error of {', '.join(wrong)}; {limit:.0e} is allowed")
        largest = np.maximum(largest, found)
    if problems:
        title = f"{_KEY} = {name} is wrong in {dtype}, by float64 NumPy (docs/kernels.md):"
        raise combine(problems, title=title)
    program = jax.make_jaxpr(lambda *qkv: jax.vjp(attend, *qkv)[0])(
        *(jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays)
    )
    forward, backward = largest[0], max(largest[1:])
    words = f"{dtype} error {forward:.1e} forward, {backward:.1e} backward, against float64"
    return words, "name=attention" in str(program)


def _segment_ids(rows: int, tokens: int) -> np.ndarray:
    """Return documents that end at odd places, another one in each row, and padding at the end."""
    ids_BT = np.ones((rows, tokens), np.int32)
    for row in range(rows):
        ids_BT[row, tokens // (3 + row) :] = 2
        ids_BT[row, tokens // 2 + 3 * row + 1 :] = 3
    ids_BT[:, tokens - tokens // 16 :] = 0
    return ids_BT
