"""How a process leaves a run of several when something went wrong in it."""

import contextlib
import os
import sys
import traceback
from types import TracebackType

import jax

from llamajax.errors import ExitCode, UserError, say


class LeavingAtOnce:
    """Ends this process where an error leaves the block, if others run with it.

    Leaving in the usual way would wait for the others (JAX's shutdown is a barrier, and so is the
    end of a save), which wait for this one in a collective. The message is written first; the exit
    code is that of a UserError, else 1. A process on its own is left to the usual way.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or not jax.distributed.is_initialized():
            return
        if isinstance(error, UserError):
            say(f"error: {error}")
        else:
            say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(error.exit_code if isinstance(error, UserError) else ExitCode.FAILED)
