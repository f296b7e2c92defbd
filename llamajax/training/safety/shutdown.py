"""How a process ends before its run does: a stop signal, or an error while others run with it."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

from llamajax.errors import ExitCode, UserError, say, say_last
from llamajax.verbs import STOP_SIGNALS, caught_signals

_EXIT_WITHIN_S = 30.0
_SIGACTION_BYTES = 256  # more than the C library's struct has on any platform


class Shutdown:
    """Whether the run was asked to stop. One for a process, made in the main thread, early.

    Until `begin_updates` there is nothing to save: a signal ends the process at once, naming the
    checkpoint to continue from. After it, the first signal sets `requested`, which the loop reads
    between steps and between batches of an evaluation; a second Ctrl-C ends the process at once.

    Python runs signal handlers only between bytecodes of the main thread, so none runs while XLA
    compiles. The C-level wake-up descriptor is written at once: a thread reads it and acts.
    """

    def __init__(self) -> None:
        self.signal: str | None = None  # the name of the first that came to this process
        self._event = threading.Event()
        self._updating = False
        self._before_exit: Callable[[], str] = lambda: "nothing was saved yet"
        self._wakeup = -1
        self._jax_handler: ctypes.Array | None = None
        self._calls = 0

    @property
    def requested(self) -> bool:
        """Whether to save and exit."""
        return self._event.is_set()

    def install(self) -> "Shutdown":
        """Catch the signals from here on; also again after a library has replaced the handlers."""
        if self._wakeup < 0:
            self._wakeup, write_end = os.pipe()
            os.set_blocking(write_end, False)
            signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="shutdown", daemon=True).start()
        for number in caught_signals():
            signal.signal(number, lambda *_: None)  # the thread acts; this keeps the default off
        return self

    def take_back(self) -> None:
        """Catch the signals again after `jax.distributed` took SIGTERM for itself.

        Its handler, which lets all processes agree on a step, gets the signal only once there are
        updates to save; before, it would be swallowed until the first step is compiled and done.
        """
        self._jax_handler = ctypes.create_string_buffer(_SIGACTION_BYTES)
        ctypes.CDLL(None).sigaction(signal.SIGTERM, None, self._jax_handler)
        self.install()

    def any_process_stops(self) -> bool:
        """Return whether a process was asked to stop, the same on all. A collective.

        JAX's preemption service, which catches the signals of several processes, agrees on the
        call at which all of them stop.
        """
        import jax
        from jax.experimental import multihost_utils

        if jax.process_count() == 1:
            return self.requested
        self._calls += 1  # not the step: an evaluation asks many times within one
        stop = multihost_utils.reached_preemption_sync_point(self._calls)
        if stop:
            self._event.set()
        return stop

    def call_before_exit(self, function: Callable[[], str]) -> None:
        """Call `function` before ending the process at once.

        It returns the name of the checkpoint that a rerun continues from.
        """
        self._before_exit = function

    def begin_updates(self) -> None:
        """From now on there are updates to save."""
        self._updating = True

    def _watch(self) -> None:
        while number := os.read(self._wakeup, 1):
            if number[0] not in STOP_SIGNALS:  # other handlers of this process write here as well
                continue
            self.signal = self.signal or signal.Signals(number[0]).name
            if not self._updating or (self._event.is_set() and number[0] == signal.SIGINT):
                self._exit()
            if self._event.is_set():  # a launcher's SIGTERM often follows a scheduler's
                continue
            self._event.set()
            say("\nstopping: finishing this step, then saving")
            if self._jax_handler is not None:
                ctypes.CDLL(None).sigaction(signal.SIGTERM, self._jax_handler, None)
                os.kill(os.getpid(), signal.SIGTERM)

    def _exit(self) -> None:
        when = "while saving" if self._updating else "before the first update"
        message = f"\nstopped {when}; a rerun continues from the last checkpoint: "
        in_any_case = threading.Timer(_EXIT_WITHIN_S, os._exit, (ExitCode.STOPPED,))
        in_any_case.daemon = True
        in_any_case.start()  # a store or disk that is gone may block the next line
        try:
            say_last(message + self._before_exit())
        finally:
            os._exit(ExitCode.STOPPED)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """End this process at once where an error leaves the block, if other processes run with it.

    A regular exit would wait for the others (JAX's shutdown is a barrier, and so is the end of a
    save), which wait for this one in a collective. The message is printed first; the exit code is
    that of a UserError, else 1. A process on its own exits in the regular way.
    """
    import jax  # `train` catches signals before it takes the seconds to import this

    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, UserError):
            say_last(f"error: {error}")
        else:
            say_last("".join(traceback.format_exception(error)).rstrip("\n"))
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(error.exit_code if isinstance(error, UserError) else ExitCode.FAILED)
