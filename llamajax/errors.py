"""The error that a user can fix. Every verb turns it into one message and exit code 2."""

import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

# JAX's import and the tracing of a step make half a million objects that stay: at the usual 700,
# looking through them for rubbish takes an eighth of what a second start needs to its first step.
_OBJECTS_BETWEEN_COLLECTIONS = 50_000


class UserError(ValueError):
    """A mistake of the user's: names the offending value, the constraint and the fix.

    The message is printed as it is, without a traceback. Never raise it for a bug of ours.
    """


def combine(problems: Sequence[str], *, title: str) -> UserError:
    """One error that lists every problem found, so that a user fixes them all in one go."""
    return UserError("\n".join([title, *(f"  - {p}" for p in problems)]))


def run_verb(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a verb on the command line's arguments and exit: its own code, or 2 for a UserError.

    All that was printed has then left. Where standard output refuses it (a full disk), that is one
    message and 2 as well; a reader that has seen enough (`| head`) ends the verb in silence.
    """
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    out = sys.stdout = _Output(sys.stdout)
    code: Any = 0
    try:
        try:
            code = main(sys.argv[1:])
        except SystemExit as left:
            code = left.code
        out.flush()
    except UserError as error:
        _complain(str(error))
        code = 2
    except OSError as error:
        if error is not out.refusal:
            raise
        refused = _given_up(out)
        code = code or refused
    finally:
        sys.stdout = out.stream
    sys.exit(code or 0)


class _Output:
    """Standard output, which remembers why it refused something."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115
        self.refusal: OSError | None = None

    def write(self, text: str) -> int:
        return self._asked(self.stream.write, text)

    def flush(self) -> None:
        self._asked(self.stream.flush)

    def _asked(self, action: Callable[..., Any], *args: str) -> Any:
        try:
            return action(*args)
        except OSError as error:
            self.refusal = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _given_up(out: _Output) -> int:
    """The exit code of a verb whose output is not wanted, or finds no room."""
    # The interpreter flushes once more at exit and would complain then.
    os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    if isinstance(out.refusal, BrokenPipeError):
        return 0
    _complain(
        f"standard output could not be written: {out.refusal.strerror}; free some space, or send "
        "it elsewhere"
    )
    return 2


def _complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
