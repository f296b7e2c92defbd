"""One verdict for all processes: what one of them finds wrong, all of them raise.

Without it, the process that failed would go on alone and the others would wait for it.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils

from llamajax.errors import ExitCode, TransientError, UserError

_MESSAGE_BYTES = 1024


def agree(problem: str | None) -> str | None:
    """The first problem that any process found, the same on all of them; None if there is none.

    A collective: to be called by all processes, at the same point of the program.
    """
    if jax.process_count() == 1:
        return problem
    text = np.zeros(_MESSAGE_BYTES, np.uint8)
    encoded = (problem or "").encode()[:_MESSAGE_BYTES]
    text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    for row in np.asarray(multihost_utils.process_allgather(text)):
        if found := bytes(row).rstrip(b"\0").decode(errors="replace"):
            return found
    return None


def raise_together(error: UserError | None) -> None:
    """Raise on all processes the first error that any of them has. A collective, as `agree`."""
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    if found := agree(None if error is None else f"{error.exit_code:d} {error}"):
        code, _, text = found.partition(" ")
        raise (TransientError if int(code) == ExitCode.TRANSIENT else UserError)(text)


def gathered(number: int) -> list[int]:
    """What each process says, by process. A collective, as `agree`."""
    if jax.process_count() == 1:
        return [number]
    # As two halves: JAX's integers have 32 bits.
    halves = np.array(divmod(number, 1 << 31), np.int32)
    rows = np.asarray(multihost_utils.process_allgather(halves))
    return [(int(high) << 31) + int(low) for high, low in rows]


def told(number: int | None) -> int | None:
    """What process 0 says (a number from 0, or None), told to all. A collective, as `agree`.

    For what is read from a shared directory: two processes may see it a moment apart.
    """
    if jax.process_count() == 1:
        return number
    found = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if number is None else number)))
    return None if found < 0 else found
