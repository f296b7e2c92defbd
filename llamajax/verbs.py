"""Run a verb as a process: signals, standard streams, exit code."""

import contextlib
import faulthandler
import gc
import io
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from llamajax.errors import ExitCode, UserError, say

# Importing JAX and tracing a step make half a million objects that stay: at the usual 700, garbage
# collection takes an eighth of the time that a second start needs to its first step.
_OBJECTS_BETWEEN_COLLECTIONS = 50_000
# Ask a process to end. SIGUSR2 is what some schedulers send before a job's time limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
# For removing half-written output; a kernel that compiles or a full NFS may take longer.
_UNWIND_WITHIN_S = 10.0
_RAISE_EVERY_S = 0.5
# What JAX raises while it is imported, for a variable of its own that it cannot read.
_JAX_REFUSES = re.compile(
    r"""[Ii]nvalid (?:truth )?value ['"]?(.*?)['"]? for (?:environment|JAX flag) '?(\w+)"""
)


def caught_signals() -> list[signal.Signals]:
    """Return the stop signals that are not ignored from the start, as SIGHUP is under nohup."""
    return [n for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]


def run_verb(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a verb on the command line's arguments and exit: its own code, or that of a UserError.

    A stop signal unwinds `main`, so that half-written output is removed, and the exit code is 143.
    SIGUSR1 writes the stacks of all threads. Standard output is flushed: if that fails (a full
    disk), it is an error of the user's; a closed pipe (`| head`) is none. Errors of standard error
    are ignored.
    """
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    _open_closed_descriptors()
    faulthandler.enable(file=2)  # a crash below Python writes the stack of every thread
    if signal.getsignal(signal.SIGUSR1) is not signal.SIG_IGN:
        faulthandler.register(signal.SIGUSR1, file=2)
    out = sys.stdout = Output(sys.stdout)
    if not isinstance(sys.stderr, Output):  # stays: the interpreter flushes it once more at exit
        sys.stderr = Output(sys.stderr, raises=False)
    interruption = _Interruption()
    code: Any = 0
    try:
        try:
            code = main(sys.argv[1:])
        except SystemExit as left:
            code = left.code
        out.flush()
    except UserError as error:
        say(f"error: {error}")
        code = error.exit_code
    except ValueError as error:
        if not (found := _JAX_REFUSES.search(str(error))):
            raise
        say(f"error: JAX cannot read {found[2].upper()}={found[1]}; unset it, or correct it")
        code = ExitCode.USER_ERROR
    except OSError as error:
        if error is not out.refusal:
            raise
        # The interpreter flushes once more at exit and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if not isinstance(error, BrokenPipeError):
            problem = f"standard output could not be written: {error.strerror}"
            say(f"error: {problem}; free some space, or send it elsewhere")
            code = code or ExitCode.USER_ERROR
    finally:
        interruption.disarm()
        sys.stdout = out.stream
    if interruption.number is not None:
        say(f"stopped by {interruption.number.name}")
    sys.exit(code or 0)


class _Interruption:
    """Turn the first stop signal into a SystemExit in the main thread.

    A handler runs only between bytecodes of the main thread, and a library's callback may swallow
    what it raises. So a thread, woken by the C-level descriptor, raises it again, and ends the
    process if that has not ended in time, or at a second Ctrl-C. `train` and `launch` replace the
    handler by their own.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self._armed, self._exit = True, SystemExit(ExitCode.STOPPED)
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may set a handler
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        numbers = caught_signals()
        for number in numbers:
            signal.signal(number, self._on_signal)
        threading.Thread(
            target=_end_in_time, args=(reading, numbers), name="signals", daemon=True
        ).start()

    def disarm(self) -> None:
        """Raise nothing from here on: the verb has ended."""
        self._armed = False

    def _on_signal(self, number: int, _: object) -> None:
        self.number = self.number or signal.Signals(number)
        handled = sys.exception()
        while handled is not None and handled is not self._exit:
            handled = handled.__context__
        if self._armed and handled is None:  # else it unwinds already
            raise self._exit


def _end_in_time(reading: int, numbers: Sequence[int]) -> None:
    """Wait for a stop signal, then until the process should have ended by itself; then end it."""
    while (first := os.read(reading, 1)[0]) not in numbers:  # other handlers write here as well
        pass
    deadline = time.monotonic() + _UNWIND_WITHIN_S
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([reading], [], [], min(left, _RAISE_EVERY_S))[0]:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        elif os.read(reading, 1)[0] == signal.SIGINT:
            break
    # Not `say`: the interpreter may have removed sys.stderr.
    with contextlib.suppress(OSError):
        os.write(2, f"stopped by {signal.Signals(first).name}\n".encode())
    os._exit(ExitCode.STOPPED)


def _open_closed_descriptors() -> None:
    """Open closed standard streams as /dev/null: else the next file opened would be written to."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one


class Output:
    """A standard stream that keeps the OSError of a failed write. raises: and raises it."""

    def __init__(self, stream: TextIO | None, *, raises: bool = True):
        self.stream = stream or io.TextIOWrapper(io.FileIO(os.devnull, "w"))
        self.refusal: OSError | None = None
        self._raises = raises

    def write(self, text: str) -> int:
        with self._keep_refusal():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._keep_refusal():
            self.stream.flush()

    @contextlib.contextmanager
    def _keep_refusal(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.refusal = error
            if self._raises:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
