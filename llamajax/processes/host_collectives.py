"""Collectives on values of the host: errors, decisions and sizes that all processes must share.

A process that fails alone leaves the others waiting for it in their next collective. Each function
here must be called by all processes, at the same point of the program.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from llamajax.errors import ExitCode, TransientError, UserError

_MESSAGE_BYTES = 1024
T = TypeVar("T")


def first_problem(problem: str | None) -> str | None:
    """Return on all processes the first problem that any of them has; None if none has one."""
    if jax.process_count() == 1:
        return problem
    for row in np.asarray(multihost_utils.process_allgather(_padded(problem or ""))):
        if found := _text(row):
            return found
    return None


def raise_together(error: UserError | None) -> None:
    """Raise on all processes the first error that any of them has."""
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    if found := first_problem(None if error is None else f"{error.exit_code:d} {error}"):
        code, _, text = found.partition(" ")
        raise (TransientError if int(code) == ExitCode.TRANSIENT else UserError)(text)


def broadcast_from_first(decide: Callable[..., T], *args: Any) -> T:
    """Return on all processes what `decide(*args)` returns on process 0; it runs there only.

    For what is read from a shared directory, which two processes may see a moment apart. The
    result must be JSON of at most 1024 bytes. Raises the UserError of `decide` on all processes.
    """
    if jax.process_count() == 1:
        return decide(*args)
    found, error = None, None
    if jax.process_index() == 0:
        try:
            found = decide(*args)
        except UserError as raised:
            error = raised
    raise_together(error)
    text = json.dumps(found)
    assert len(text) <= _MESSAGE_BYTES, text
    return json.loads(_text(multihost_utils.broadcast_one_to_all(_padded(text))))


def all_gather_host(number: int) -> list[int]:
    """Return the number that each process passes, by process."""
    if jax.process_count() == 1:
        return [number]
    # As two halves: JAX's integers have 32 bits.
    halves = np.array(divmod(number, 1 << 31), np.int32)
    rows = np.asarray(multihost_utils.process_allgather(halves))
    return [(int(high) << 31) + int(low) for high, low in rows]


def _padded(text: str) -> np.ndarray:
    encoded = text.encode()[:_MESSAGE_BYTES]
    return np.frombuffer(encoded.ljust(_MESSAGE_BYTES, b"\0"), np.uint8)


def _text(row: np.ndarray) -> str:
    return bytes(np.asarray(row)).rstrip(b"\0").decode(errors="replace")
