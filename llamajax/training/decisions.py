"""Decisions that all processes must take at the same step."""

import jax
import numpy as np
from jax.experimental import multihost_utils

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
