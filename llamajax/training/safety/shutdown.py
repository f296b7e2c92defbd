"""A stop signal: finish the step, save, leave with 143; or leave at once when that is right.

Python runs signal handlers only between bytecodes of the main thread, so none runs while XLA
compiles. The C-level wake-up descriptor is written at once: a thread reads it and decides.
"""

import ctypes
import os
import signal
import threading
from collections.abc import Callable

from llamajax.errors import ExitCode, say
from llamajax.verbs import STOP_SIGNALS, caught_signals

_LEAVE_WITHIN_S = 30.0
_SIGACTION_BYTES = 256  # more than the C library's struct has on any platform


class Shutdown:
    """Whether the run was asked to end. One for a process, made in the main thread, early.

    Until `begin_updates` there is nothing to save: a signal ends the process at once, naming the
    checkpoint to continue from. After it, the first signal sets `requested`, which the loop reads
    between steps and between batches of an evaluation; a second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._updating = False
        self._previous: Callable[[], str] = lambda: "nothing was saved yet"
        self._in = -1
        self._of_jax: ctypes.Array | None = None
        self._questions = 0

    @property
    def requested(self) -> bool:
        """Whether to save and leave."""
        return self._event.is_set()

    def install(self) -> "Shutdown":
        """Catch the signals from here on; also again after a library took them over."""
        if self._in < 0:
            self._in, out = os.pipe()
            os.set_blocking(out, False)
            signal.set_wakeup_fd(out, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="shutdown", daemon=True).start()
        for number in caught_signals():
            signal.signal(number, lambda *_: None)  # the thread acts; this keeps the default off
        return self

    def take_back(self) -> None:
        """Catch the signals again after `jax.distributed` took SIGTERM for itself.

        Its handler, which lets all processes agree on a step, gets the signal only once there are
        updates to save; before, it would be swallowed until the first step is compiled and done.
        """
        self._of_jax = ctypes.create_string_buffer(_SIGACTION_BYTES)
        ctypes.CDLL(None).sigaction(signal.SIGTERM, None, self._of_jax)
        self.install()

    def next_question(self) -> int:
        """Number of this question to the others, the same on all processes.

        A step would not do: an evaluation asks many times within one.
        """
        self._questions += 1
        return self._questions

    def request(self) -> None:
        """Stop as if the signal had come here: all processes agreed on it."""
        self._event.set()

    def name_previous(self, describe: Callable[[], str]) -> None:
        """How to name the checkpoint that a rerun continues from, when leaving at once."""
        self._previous = describe

    def begin_updates(self) -> None:
        """From now on there are updates to save."""
        self._updating = True

    def _watch(self) -> None:
        while number := os.read(self._in, 1):
            if number[0] not in STOP_SIGNALS:  # other handlers of this process write here as well
                continue
            if not self._updating or (self._event.is_set() and number[0] == signal.SIGINT):
                self._leave()
            if self._event.is_set():  # a launcher's SIGTERM often follows a scheduler's
                continue
            self._event.set()
            say("\nstopping: finishing this step, then saving")
            if self._of_jax is not None:
                ctypes.CDLL(None).sigaction(signal.SIGTERM, self._of_jax, None)
                os.kill(os.getpid(), signal.SIGTERM)

    def _leave(self) -> None:
        when = "while saving" if self._updating else "before the first update"
        message = f"\nstopped {when}; a rerun continues from the last checkpoint: "
        in_any_case = threading.Timer(_LEAVE_WITHIN_S, os._exit, (ExitCode.STOPPED,))
        in_any_case.daemon = True
        in_any_case.start()  # a store or disk that is gone may block the next line
        try:
            say(message + self._previous())
        finally:
            os._exit(ExitCode.STOPPED)
