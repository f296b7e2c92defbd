"""Decisions that all processes must take at the same step."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from llamajax.errors import UserError
from llamajax.processes.agreement import raise_together
from llamajax.training.safety.shutdown import Shutdown

# Asking the others costs a round trip that waits for the devices, so clocks are compared rarely.
_COMPARE_EVERY_STEPS = 16


def agreed(step: int, wish: Shutdown | bool) -> bool:
    """Whether all processes do it at this step: what one alone wishes, if there is only one.

    A stop is agreed by JAX's preemption service, which caught the signal in its place; a wish that
    depends on this process's clock (saving by minutes) is process 0's, asked every few steps.
    """
    if jax.process_count() == 1:
        return wish.requested if isinstance(wish, Shutdown) else wish
    if isinstance(wish, Shutdown):
        stop = multihost_utils.reached_preemption_sync_point(wish.next_question())
        if stop:
            wish.request()
        return stop
    if step % _COMPARE_EVERY_STEPS:
        return False
    return bool(multihost_utils.broadcast_one_to_all(np.int32(wish)))


def decided_by_primary(decide: Callable[[], int | None]) -> int | None:
    """What `decide` says on process 0 (a number from 0, or None), told to all; its UserError too.

    For what is read from a shared directory: two processes may see it a moment apart.
    """
    if jax.process_count() == 1:
        return decide()
    found, problem = None, None
    if jax.process_index() == 0:
        try:
            found = decide()
        except UserError as error:
            problem = error
    raise_together(problem)
    told = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if found is None else found)))
    return None if told < 0 else told
